"""Fixtures of the studies."""

import pytest
import torch

from neuclip.data.demo.build import tiny_demo

torch.set_num_threads(1)  # as in tests/conftest.py: several test processes share few cores


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    """A small embedded data set: some hundred pairs, all splits. Do not write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    tiny_demo(out, characters=64, seed=0)
    return out


@pytest.fixture(scope="session")
def first_glyphs_dir(demo_dir, tmp_path_factory):
    """Small data with the splits of the first version of the glyphs."""
    folder = tmp_path_factory.mktemp("first") / "glyphs"
    folder.mkdir()
    for name in ("train", "demo.json"):
        (folder / name).symlink_to(demo_dir / name)
    for split in ("unseen_face", "unseen_character"):
        (folder / split).symlink_to(demo_dir / f"{split}_test")
    return folder
