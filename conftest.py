"""What the tests of the package and of the studies share."""

import pytest
import torch

from neuclip.data.demo.build import tiny_demo

torch.set_num_threads(1)  # several test processes share few cores, and one thread is exact


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    """A small embedded data set: some hundred pairs, all five splits. Do not write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    tiny_demo(out, characters=64, seed=0)
    return out
