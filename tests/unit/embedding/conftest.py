import pytest

from embedding_folders import COLORS, write_pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of one colour each, whose features are known."""
    return write_pictures(tmp_path / "pictures", COLORS)
