import pytest
import torch

from neuclip.data.demo.build import tiny_demo

torch.set_num_threads(1)  # several test processes share few cores, and one thread is exact


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    """A small embedded data set: some hundred pairs, all three splits. Do not write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    tiny_demo(out, characters=64, seed=0)
    return out


def pytest_make_parametrize_id(config, val, argname):
    """Names a case of many bytes by its argument: compressed bytes hold the time they were made."""
    return argname if isinstance(val, bytes) and len(val) > 16 else None
