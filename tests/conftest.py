import gc
import os
import sys

import pytest
from huggingface_hub import close_session, constants


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keeps tests with a fixture of their module on one worker: two would build it twice."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        shared = any(found[-1].scope == "module" for found in fixtures)
        if shared and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leaves the garbage collector out while modules are imported, which all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_vocabulary():
    """Tokenizers of one kind share their tables; open_clip unpacks 49,000 merges for each."""
    if "open_clip" not in sys.modules:
        yield
        return
    kind = sys.modules["open_clip"].SimpleTokenizer
    read, tables = kind.__init__, {}

    def init(self, *args, **settings):
        key = repr((args, sorted(settings.items())))
        if key not in tables:
            read(self, *args, **settings)
            tables[key] = vars(self).copy()
        vars(self).update(tables[key])

    kind.__init__ = init
    yield
    kind.__init__ = read


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """No test cuts the power: its thousands of small files may stay in memory."""
    flush, os.fsync = os.fsync, os.fstat
    yield
    os.fsync = flush


@pytest.fixture(scope="session")
def window():
    """The window of one headless browser, for tests of the group `browser.GROUP`."""
    import browser

    with browser.started() as driver:
        yield driver


@pytest.fixture
def set_hub(tmp_path, monkeypatch):
    """The library's settings, which it reads from the environment when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def change(name, value):
        monkeypatch.setattr(constants, name, value)
        close_session()
        if name == "ENDPOINT":
            template = value + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    yield change
    close_session()


def pytest_make_parametrize_id(config, val, argname):
    """Names a case of many bytes by its argument: compressed bytes hold the time they were made."""
    return argname if isinstance(val, bytes) and len(val) > 16 else None
