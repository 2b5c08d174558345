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


def _with_splits(demo, folder, parts):
    """The same data in a folder whose splits have other names."""
    folder.mkdir()
    for name in ("train", "demo.json"):
        (folder / name).symlink_to(demo / name)
    for split in ("unseen_face", "unseen_character"):
        found = demo / f"{split}_test"
        for part in parts:
            (folder / f"{split}{part}").symlink_to(found if found.exists() else demo / split)
    return folder


@pytest.fixture(scope="session")
def first_glyphs_dir(demo_dir, tmp_path_factory):
    """Small data with the splits of the first version of the glyphs."""
    return _with_splits(demo_dir, tmp_path_factory.mktemp("first") / "glyphs", [""])


@pytest.fixture(scope="session")
def glyphs_dir(demo_dir, tmp_path_factory):
    """Small data with the splits of today's glyphs."""
    parts = ["_development", "_test"]
    return _with_splits(demo_dir, tmp_path_factory.mktemp("today") / "glyphs", parts)
