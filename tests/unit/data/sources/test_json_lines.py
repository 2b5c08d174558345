"""Tables in JSON, as the hub's folders of images and many papers' repositories have them."""

import gzip
import json

import pytest

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.opening import open_source
from neuclip.errors import UserError


@pytest.fixture
def write(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture(1))

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


ROWS = [
    {"file_name": "a.png", "text": "one"},
    {"file_name": "a.png", "text": ["two", "three"]},
    {"file_name": "a.png", "text": "\ud800"},
    {"file_name": "a.png"},
]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", LINES),
        ("t.ndjson", LINES + "\n\n"),
        ("t.jsonl.gz", gzip.compress(LINES.encode())),
        ("t.json", json.dumps(ROWS, indent=2)),
        ("rows.txt", "\ufeff" + LINES),
        ("metadata.jsonl", LINES.encode("utf-16")),
    ],
)
def test_rows(write, name, content):
    source = open_source(write(name, content), captions="optional")
    found = [source.read(n).captions for n in range(len(source))]
    assert found == [("one",), ("two", "three"), ("?",), ()]
    assert source.read(1).key == "a.png"


def test_a_folder_of_images_with_metadata(write, tmp_path):
    write("metadata.jsonl", LINES)
    source = open_source(str(tmp_path))
    assert source.read(0).caption == "one"
    assert "JSON lines" in source.opened


def test_annotations_of_coco_are_named(write):
    content = json.dumps({"info": {}, "images": [{"id": 1}], "annotations": [{"image_id": 1}]})
    with pytest.raises(UserError, match="holds annotations as COCO writes them: write one line"):
        open_source(write("captions_train2017.json", content))


def test_lines_that_are_not_objects_are_counted(write):
    source = open_source(write("t.jsonl", f"{LINES}\n[1]\n{{broken\n"))
    assert len(source) == 4
    assert source.unused[0].startswith("2 lines of ")
    assert source.unused[0].endswith("without a JSON object (first: line 5)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a.png", "text": 3}', "line 1: 'text' is 3, not a text or a list of texts"),
        ('{"image": "a.png", "text": [["x"]]}', r"'text' is \[\[\"x\"\]\], not a text"),
        ('{"image": {"x": 1}, "text": "x"}', "'image' is {.*}, not the path of an image"),
        ('{"picture": "a.png"}', "its columns are 'picture': name one with --csv-img-key"),
        ("{}", "none of the columns"),
        ("{broken", "contains no JSON object: expected one JSON object a line"),
        ('{"image": "none.png", "text": "x"}', "none of the 1 image paths tried exists"),
    ],
)
def test_what_cannot_be_read(write, content, message):
    with pytest.raises(UserError, match=message):
        open_source(write("t.jsonl", content))


def test_several_keys_are_several_captions(write):
    row = {"image": "a.png", "short": "one", "long": ["two", "three"]}
    path = write("t.jsonl", json.dumps(row))
    source = open_source(path, ReadingConfig(csv_caption_key="short, long"))
    assert source.read(0).captions == ("one", "two", "three")
