"""The pool of processes: one for the whole run, also where pytest-xdist has several workers."""

from collections.abc import Iterator

import pytest
from gloo_pool import GlooPool


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all tests of the pool on one worker: each would start a pool of its own."""
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("pool"))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    """Four processes that form gloo groups of up to four."""
    pool = GlooPool(4, tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()
