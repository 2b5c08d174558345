import pytest
import torch
from huggingface_hub import close_session, constants

from neuclip.data.demo.build import tiny_demo

torch.set_num_threads(1)  # several test processes share few cores, and one thread is exact


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    """A small embedded data set: some hundred pairs, all three splits. Do not write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    tiny_demo(out, characters=64, seed=0)
    return out


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
