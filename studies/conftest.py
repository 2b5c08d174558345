"""Fixtures of the studies."""

import pytest

from neuclip.catalogue import registry


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


@pytest.fixture(autouse=True)
def _same_catalogue():
    """Variants that a test registers leave the catalogue of this process after it."""
    before = dict(registry._table)
    yield
    registry._table.clear()
    registry._table.update(before)
