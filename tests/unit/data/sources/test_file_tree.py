"""Folders as people keep them: links, hidden files, endings in any case."""

import os
from pathlib import Path

import pytest

from neuclip.data.decode import image_endings
from neuclip.data.sources.class_folders import ClassFolders
from neuclip.data.sources.file_tree import FileTree
from neuclip.data.sources.folders import FolderSource
from neuclip.errors import UserError


@pytest.fixture
def write(tmp_path, picture):
    """Writes files below the test's folder; images and captions by their endings."""

    def files(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() if name.lower().endswith("txt") else picture(1))
        return tmp_path

    return files


def listed(folder):
    tree = FileTree(folder)
    return [below + name for below, names in tree for name in names], tree.tally.lines()


def keys(source):
    return [source.read(position).key for position in range(len(source))]


def link(path, target):
    Path(path).symlink_to(target)


def test_links_to_folders_elsewhere_are_followed_once(write):
    folder = write("set/a/1.jpg", "disk/b/2.jpg", "disk/b/deep/3.jpg")
    link(folder / "set/b", folder / "disk/b")
    link(folder / "set/c", folder / "disk/b")
    assert listed(folder / "set") == (
        ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg"],
        ("1 of 4 files, link to a folder that is read already (c/)",),
    )


@pytest.mark.parametrize("target", [".", "..", "a", "/"])
def test_links_into_the_folder_or_around_it_are_counted(write, target):
    folder = write("set/a/1.jpg", "set/b/2.jpg") / "set"
    link(folder / "b/again", target if target == "/" else folder / target)
    assert listed(folder) == (
        ["a/1.jpg", "b/2.jpg"],
        ("1 of 3 files, link to a folder that is read already (b/again)",),
    )


def test_a_loop_outside_of_the_folder_ends(write):
    folder = write("disk/1.jpg", "set/0.jpg")
    link(folder / "disk/self", folder / "disk")
    link(folder / "set/b", folder / "disk")
    files, (line,) = listed(folder / "set")
    assert files == ["0.jpg", "b/1.jpg"] and "link to a folder that is read already" in line


def test_the_folder_itself_may_be_a_link(write):
    folder = write("disk/1.jpg")
    link(folder / "set", folder / "disk")
    assert listed(folder / "set") == (["1.jpg"], ())


def test_links_to_files_are_read_and_broken_ones_counted(write):
    folder = write("set/1.jpg", "disk/2.jpg") / "set"
    link(folder / "2.jpg", folder.parent / "disk/2.jpg")
    link(folder / "3.jpg", folder.parent / "gone.jpg")
    link(folder / "4.jpg", folder / "4.jpg")
    os.mkfifo(folder / "5.jpg")
    files, (broken, special) = listed(folder)
    assert files == ["1.jpg", "2.jpg"]
    assert broken.startswith("2 of 5 files, link that leads nowhere (")
    assert special == "1 of 5 files, not a regular file (5.jpg)"


def test_hidden_files_are_counted(write):
    folder = write("1.jpg", "._1.jpg", ".cache/2.jpg", "__MACOSX/._1.jpg", ".neuclip/x.npz")
    files, (line,) = listed(folder)
    assert files == ["1.jpg"]
    assert line.startswith("3 of 4 files, hidden, or of macOS (")


def test_links_into_a_hidden_store_are_followed(write):
    folder = write("set/.store/x/1.jpg") / "set"
    link(folder / "x", ".store/x")
    assert listed(folder)[0] == ["x/1.jpg"]


def test_every_image_that_can_be_decoded_is_found(tmp_path, picture):
    """The endings come from the decoder: no format is read from tables and missed in folders."""
    formats = {"jp2": "jpeg2000", "jfif": "jpeg", "dib": "bmp"}
    endings = ("gif", "avif", "jfif", "jp2", "ppm", "bmp", "tif", "JPG", "dib")
    for ending in endings:
        kind = formats.get(ending, ending.lower())
        (tmp_path / f"{ending}.{ending}").write_bytes(picture(1, kind))
        (tmp_path / f"{ending}.txt").write_text(ending)
    found = keys(FolderSource(tmp_path))
    assert sorted(found) == sorted(e for e in endings if e.lower() in image_endings())
    assert {"gif", "jfif", "ppm", "bmp", "tif", "JPG"} <= set(found)


def test_captions_of_any_known_ending_and_case(write):
    source = FolderSource(
        write("a.JPG", "a.TXT", "b.v1.jpg", "b.v1.txt", "c.jpg"), captions="optional"
    )
    assert keys(source) == ["a", "b.v1", "c"]
    assert source.read(0).caption == "a.TXT"
    assert source.opened == "captions in .TXT, .txt beside them"
    assert source.unused == ()


def test_files_of_a_folder_that_are_not_read_are_counted(write):
    folder = write("a.jpg", "a.txt", "a.json", "b.json", "c.txt", "table.parquet", "notes.docx")
    assert set(FolderSource(folder).unused) == {
        "2 of 7 files, without the rest of a sample (b.json, c.txt)",
        "2 of 7 files, unknown ending (.docx, .parquet)",
    }


def test_without_captions_the_message_names_what_is_there(write):
    folder = write("images/1.jpg", "captions/1.txt", "captions/2.txt")
    with pytest.raises(UserError, match=r"needs 1\.txt beside it\n.*2 of 3 files, without the res"):
        FolderSource(folder)
    assert not FolderSource(folder, captions="optional").has_captions
    write("images/1.json")
    with pytest.raises(UserError, match=r"or --caption-key KEY to read 1\.json"):
        FolderSource(folder)


def test_names_that_are_not_utf_8_have_printable_keys(tmp_path, picture):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(picture(1))
    assert keys(FolderSource(tmp_path, captions="optional")) == [r"caf\udce9"]


def test_class_folders_follow_links_and_count_too(write):
    folder = write("set/cat/1.jpg", "disk/2.gif.jpg", "set/cat/notes.docx")
    link(folder / "set/dog", folder / "disk")
    source = ClassFolders(folder / "set", ["cat", "dog"])
    assert keys(source) == ["cat/1", "dog/2.gif"]
    assert source.unused == ("1 of 3 files, unknown ending (.docx)",)
