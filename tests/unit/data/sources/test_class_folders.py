import pickle

import pytest

from neuclip.data.samples import SampleError
from neuclip.data.sources.class_folders import ClassFolders
from neuclip.errors import UserError


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("b/2.PNG", "b/1.png", "a/deep/3.jpg", "c/4.webp", "c/notes.txt", "c/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    return tmp_path


def test_images_by_class_in_order(folder):
    source = pickle.loads(pickle.dumps(ClassFolders(folder, ["b", "a", "c"])))
    found = [source.read(position) for position in range(len(source))]
    assert [each.key for each in found] == ["b/1", "b/2", "a/deep/3", "c/4"]
    assert [each.class_index for each in found] == [0, 0, 1, 2]
    assert {each.caption for each in found} == {""}


def test_images_of_one_name_have_keys_of_their_own(tmp_path, picture):
    names = ("b/1.png", "b/1.jpg", "b/deep/1.png", "a/1.png", "a/2.png", "a/2.png.jpg")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    source = ClassFolders(tmp_path, ["a", "b"])
    keys = [source.locate(position)[1] for position in range(len(source))]
    assert keys == ["a/1", "a/2", "a/2.png.jpg", "b/1.jpg", "b/1.png", "b/deep/1"]
    assert [source.read(position).key for position in range(len(source))] == keys


def test_a_class_without_images(folder):
    (folder / "d").mkdir()
    with pytest.raises(UserError, match="d: no images of this class"):
        ClassFolders(folder, ["a", "d"])


def test_a_corrupt_image_is_named(folder):
    (folder / "a/deep/3.jpg").write_bytes(b"no image")
    with pytest.raises(SampleError) as caught:
        ClassFolders(folder, ["b", "a"]).read(2)
    assert (caught.value.damage.key, caught.value.damage.kind) == ("a/deep/3", "image")
