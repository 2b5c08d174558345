"""The pool of processes, one for the whole session."""

from collections.abc import Iterator

import pytest
from gloo_pool import GlooPool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    """Four processes that form gloo groups of up to four."""
    pool = GlooPool(4, tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()
