"""What a source is, by its names and first bytes; one split of several; what is not read."""

import gzip
import json
import logging

import pytest

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.folder_contents import EVALUATION_SPLITS
from neuclip.data.opening import open_source
from neuclip.data.recognition import recognise
from neuclip.errors import UserError

AUTO = ReadingConfig()


@pytest.fixture
def make(tmp_path, picture, write_tar, pairs):
    """Files by name: their ending decides on the content."""

    def content(name):
        if name.endswith((".csv", ".tsv")):
            return b"filepath\ttitle\na.png\tx\n"
        if name.endswith("jsonl"):
            return b'{"file_name": "a.png", "text": "x"}\n'
        return picture(1) if name.endswith(".png") else b"words"

    def make(*names, folder="set"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".tar"):
                write_tar(path, pairs(range(2)))
            else:
                path.write_bytes(content(name))
        return tmp_path / folder

    return make


@pytest.mark.parametrize(
    ("names", "kind", "read", "unused"),
    [
        (["0.tar", "1.tar", "README.md"], "webdataset", ["0.tar", "1.tar"], []),
        (["0.tar", "0.parquet", "0_stats.json"], "webdataset", ["0.tar"],
         ["1 metadata table (0.parquet)"]),
        (["0/0.png", "0/0.txt", "0.parquet", "1/1.png", "1.parquet"], "folder", ["."],
         ["2 metadata tables (0.parquet, ...)"]),
        (["a.png", "a.csv", "b.csv"], "csv", ["a.csv", "b.csv"], []),
        (["a.csv", "x.parquet"], "csv", ["a.csv"], ["1 .parquet file (x.parquet)"]),
        (["a.png", "metadata.jsonl"], "jsonl", ["metadata.jsonl"], []),
        (["a.png", "metadata.csv"], "csv", ["metadata.csv"], []),
        (["cats/a.png", "dogs/b.png"], "folder", ["."], []),
    ],
)  # fmt: skip
def test_folders(make, names, kind, read, unused):
    folder = make(*names)
    found = recognise(str(folder), AUTO)
    assert (found.kind, list(found.unused), found.split) == (kind, unused, "")
    assert list(found.paths) == [str(folder / name) for name in read]


LAYOUTS = {
    "tables": ["train-0.csv", "train-1.csv", "test-0.csv", "validation.csv", "extra.csv"],
    "shards": ["cc3m-train-0000.tar", "cc3m-validation-0000.tar", "cc3m-test-0.tar"],
    "folders": ["train/a.png", "train/a.txt", "test/b.png", "test/b.txt", "val2017/c.png"],
    "folders of metadata": [
        f"{split}/{name}"
        for split in ("train", "test", "dev")
        for name in ("a.png", "metadata.jsonl")
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("wanted", "splits", "split"),
    [
        ("", ("train",), "train"),
        ("", EVALUATION_SPLITS, "test"),
        ("/test", ("train",), "test"),
        ("/validation", ("train",), "validation"),
    ],
)
def test_splits_never_mix(make, layout, wanted, splits, split):
    folder = make(*LAYOUTS[layout])
    found = recognise(f"{folder}{wanted}", AUTO, splits)
    words = {"validation": ("val", "dev"), "train": ("train",), "test": ("test",)}[split]
    names = [path.removeprefix(str(folder)) for path in found.paths]
    assert names
    assert all(any(word in name for word in words) for name in names)
    if not wanted:
        assert found.split == split
        assert found.words.endswith(f", split {split}")
        assert len(found.unused) == (3 if layout == "tables" else 2)


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.csv", "train-1.csv"],  # one split
        ["0.csv", "testing.csv"],
        ["training_images/a.png", "b.png"],
        ["train/a.png", "plane/b.png"],  # classes
    ],
)
def test_one_split_or_none_is_all_of_a_folder(make, names):
    found = recognise(str(make(*names)), AUTO)
    assert (found.split, found.unused) == ("", ())


def test_a_split_that_is_not_there(make):
    folder = make("test-0.csv", "validation-0.csv")
    with pytest.raises(UserError, match=r"has no split train: name the one to read, .*/test or "):
        recognise(str(folder), AUTO)
    with pytest.raises(UserError, match=r"train: no such file or folder$"):
        recognise(f"{folder}/train", AUTO)
    with pytest.raises(UserError, match="hf download owner/set --repo-type dataset"):
        recognise("owner/set", AUTO)


def test_a_dataset_of_several_splits(make, tmp_path):
    folder = make("train/state.json", "test/state.json", "dataset_dict.json")
    found = recognise(str(folder), AUTO)
    assert (found.kind, found.split) == ("huggingface", "train")
    assert found.paths == (str(folder / "train"),)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.tar", "tar", "webdataset"),
        ("x.bin", "tar", "webdataset"),
        ("x.tar", b"", "webdataset"),  # damage, counted on reading
        ("x.tar", b"\0" * 10240, "webdataset"),
        ("x.csv", b"anything", "csv"),
        ("x.txt", b"filepath\ttitle\n", "csv"),
        ("x.json", b' [{"image"', "jsonl"),
        ("x", b'{"image": 1}', "jsonl"),
        ("x.csv.gz", gzip.compress(b"a,b", mtime=0), "csv"),
        ("x.dat", b"PAR1", "parquet"),
    ],
)
def test_files(tmp_path, write_tar, pairs, name, content, kind):
    if content == "tar":
        write_tar(tmp_path / name, pairs(range(1)))
    else:
        (tmp_path / name).write_bytes(content)
    assert recognise(str(tmp_path / name), AUTO).kind == kind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar", b"version https://git-lfs.github.com/spec/v1\noid x", "is a git-lfs pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        ("x.csv", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("x.tar.gz", gzip.compress(b"x", mtime=0), "unpack it with gunzip"),
        ("x.tar", gzip.compress(b"x", mtime=0), "unpack it with gunzip"),
        ("x.zip", b"PK\x03\x04", "unpack it with unzip"),
        ("x.arrow", b"\xff\xff\xff\xff", "give the folder that save_to_disk wrote"),
        ("x.jpg", b"\xff\xd8\xff\xe0", "is a JPEG image; give its folder"),
        ("x.txt", b"https://host/a.jpg\nhttps://host/b.jpg\n", "img2dataset"),
        ("x.txt", b"some words\n", "is of an unknown kind: expected tar shards"),
        ("x.csv", b"", "is an empty file"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        recognise(str(tmp_path / name), AUTO)


def test_a_damaged_shard_among_others_is_no_error(make):
    folder = make("0.tar", "1.tar")
    (folder / "0.tar").write_bytes(b"<html>")
    source = open_source(f"{folder}/{{0..1}}.tar")
    assert [damage.kind for damage in source.damage] == ["shard"]


def test_the_log_names_what_was_opened(make, caplog):
    folder = make("train-0.csv", "test-0.csv", "a.png")
    with caplog.at_level(logging.INFO):
        source = open_source(str(folder))
    assert source.opened == (
        f"{folder}: table, split train, 1 sample; images from column 'filepath', captions from "
        "'title'"
    )
    assert caplog.messages == [source.opened, "not read: 1 test file (test-0.csv)"]


@pytest.mark.parametrize(
    ("names", "captions", "found"),
    [
        (["a.png", "b.png"], "if_any", ["", ""]),
        (["a.png", "b.png", "b.txt"], "if_any", [None, "words"]),
        (["a.png", "b.png", "b.txt"], "optional", ["", "words"]),
    ],
)
def test_captions_are_required_only_where_they_are_needed(make, names, captions, found):
    source = open_source(str(make(*names)), captions=captions)
    assert source.has_captions == ("b.txt" in names)
    for position, caption in enumerate(found):
        if caption is None:
            with pytest.raises(Exception, match="caption_missing"):
                source.read(position)
        else:
            assert source.read(position).caption == caption


def test_other_sources_without_captions(make, tmp_path, write_tar, picture):
    (make("a.png") / "t.csv").write_text("filepath\na.png\n")
    (tmp_path / "set" / "t.jsonl").write_text(json.dumps({"image": "a.png"}))
    write_tar(tmp_path / "set" / "0.tar", [("a.png", picture(1))])
    for name in ("t.csv", "t.jsonl", "0.tar"):
        path = str(tmp_path / "set" / name)
        assert open_source(path, captions="if_any").read(0).captions == ()
        with pytest.raises(UserError, match="caption"):
            open_source(path)


def test_remote_shards_without_captions(tmp_path, write_tar, picture):
    write_tar(tmp_path / "0.tar", [("a.png", picture(1))])
    reading = ReadingConfig(cache_dir=str(tmp_path / "cache"), allow_pipe=True)
    source = open_source(f"pipe:cat {tmp_path}/0.tar", reading, captions="if_any")
    try:
        assert source.read(0).captions == ()
    finally:
        source.close()


def test_the_opening_line_names_the_keys_of_captions(tmp_path, write_tar, picture):
    texts = [("0.txt", b"plain"), ("0.json", b'{"long": "of the json"}')]
    write_tar(tmp_path / "0.tar", [("0.png", picture(1)), *texts])
    source = open_source(str(tmp_path), ReadingConfig(caption_key="txt;long"))
    assert source.opened.endswith("captions from 'txt' or 'long' in the .json")
    assert source.read(0).caption == "of the json"
