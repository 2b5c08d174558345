"""Fixtures of the studies."""

import pytest
import torch

from neuclip.data.demo.build import tiny_demo

torch.set_num_threads(1)  # as in tests/conftest.py: several test processes share few cores


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    """A small embedded data set: some hundred pairs, all three splits. Do not write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    tiny_demo(out, characters=64, seed=0)
    return out
