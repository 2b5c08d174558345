"""Labels, hard negatives, pair weights and caption weights, alike from every kind of source."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.opening import open_source
from neuclip.data.samples import NO_ANNOTATIONS, Annotations, SampleError, Unusable
from neuclip.errors import UserError
from shard_server import serving

KEYS = {"label_key": "class", "hard_negative_key": "not", "pair_weight_key": "w"}
READING = ReadingConfig(caption_keys="long=3,short=1", **KEYS)
ROWS = [
    {"long": "a cat on a mat", "short": "cat", "class": 3, "not": ["a dog", "a mat"], "w": 0.5},
    {"long": "", "short": "dog", "class": None, "not": "a cat", "w": 2},
    {"long": "a bird", "short": None, "class": "3", "not": None, "w": 1},
]
EXPECTED = [
    (("a cat on a mat", "cat"), (3.0, 1.0), "3", ("a dog", "a mat"), 0.5),
    (("dog",), (1.0,), "", ("a cat",), 2.0),
    (("a bird",), (3.0,), "3", (), 1.0),
]


def csv(folder, rows, write_tar):
    def cell(value):
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(cell(row[key]) for key in row) for row in rows]
    (folder / "t.csv").write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    return folder / "t.csv"


def jsonl(folder, rows, write_tar):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "t.jsonl"


def _table(rows):
    lists = [r["not"] if isinstance(r["not"], list) else [r["not"]] for r in rows]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    labels = [None if each is None else str(each) for each in columns["class"]]
    return pa.table(columns | {"not": lists, "class": labels})


def parquet_of_paths(folder, rows, write_tar):
    pq.write_table(_table(rows), folder / "t.parquet")
    return folder / "t.parquet"


def parquet_with_images(folder, rows, write_tar):
    images = [{"bytes": (folder / row["filepath"]).read_bytes(), "path": None} for row in rows]
    table = _table(rows).drop_columns(["filepath"]).append_column("image", pa.array(images))
    pq.write_table(table, folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def hugging_face_dataset(folder, rows, write_tar):
    images = [{"bytes": (folder / row["filepath"]).read_bytes(), "path": None} for row in rows]
    table = _table(rows).drop_columns(["filepath"]).append_column("image", pa.array(images))
    saved = folder / "saved"
    saved.mkdir()
    with pa.ipc.new_stream(saved / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (saved / "dataset_info.json").write_text("{}")
    return saved


def folder_of_images(folder, rows, write_tar):
    for row in rows:
        (folder / row["filepath"]).with_suffix(".json").write_text(json.dumps(row))
    return folder


def shards(folder, rows, write_tar):
    members = {}
    for row in rows:
        name = row["filepath"].removesuffix(".png")
        members[f"{name}.png"] = (folder / row["filepath"]).read_bytes()
        members[f"{name}.json"] = json.dumps(row).encode()
    return write_tar(folder / "0.tar", members.items())


SOURCES = [
    csv, jsonl, parquet_of_paths, parquet_with_images, hugging_face_dataset, folder_of_images,
    shards,
]  # fmt: skip


@pytest.fixture
def rows(tmp_path, picture):
    for number in range(len(ROWS)):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return [{"filepath": f"{number}.png", **row} for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_reads_the_same(tmp_path, rows, write, write_tar):
    source = open_source(str(write(tmp_path, rows, write_tar)), READING)
    for position, (captions, weights, label, negatives, weight) in enumerate(EXPECTED):
        sample = source.content(position)
        told = sample.annotations
        assert (sample.captions, told.caption_weights) == (captions, weights)
        assert (told.label, told.negatives, told.pair_weight) == (label, negatives, weight)
        alone = source.texts(position)
        assert alone.image is None and alone == sample.with_image(None)


def test_remote_shards_read_the_same(tmp_path, rows, write_tar):
    """Labels, hard negatives, weights and drawn captions, without a manifest or an index."""
    local = open_source(str(shards(tmp_path, rows, write_tar)), READING)
    reading = READING.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    with serving(tmp_path) as server:
        remote = open_source(f"{server.url}/0.tar", reading)
        try:
            for position in range(len(ROWS)):
                assert remote.content(position) == local.content(position)
                assert remote.texts(position) == local.texts(position)
        finally:
            remote.close()


@pytest.mark.parametrize("write", SOURCES)
def test_a_source_without_the_key_is_refused_when_it_is_opened(tmp_path, rows, write, write_tar):
    reading = READING.model_copy(update={"label_key": "colour"})
    with pytest.raises(UserError, match=r"'colour'.*--label-key") as error:
        open_source(str(write(tmp_path, rows, write_tar)), reading)
    assert "class" in str(error.value)  # the keys that exist


@pytest.mark.parametrize("write", SOURCES)
def test_a_bad_weight_is_a_corrupt_sample(tmp_path, rows, write, write_tar):
    rows[1]["w"] = -1.0
    source = open_source(str(write(tmp_path, rows, write_tar)), READING)
    with pytest.raises(SampleError, match="'w' is -1; a weight is finite and 0 or more") as error:
        source.content(1)
    assert error.value.damage.kind == "pair_weight"
    assert source.content(2).annotations.pair_weight == 1


def test_captions_from_text_files_go_with_annotations_from_json(tmp_path, rows, write_tar):
    for row in rows:
        (tmp_path / row["filepath"]).with_suffix(".txt").write_text("the text")
    reading = ReadingConfig(**KEYS)
    members = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    folder_of_images(tmp_path, rows, write_tar)
    assert open_source(str(tmp_path), reading).content(0).captions == ("the text",)
    members |= {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
    source = open_source(str(write_tar(tmp_path / "tars" / "0.tar", members.items())), reading)
    for opened in (source, open_source(str(tmp_path), reading)):
        assert opened.content(0).annotations.negatives == ("a dog", "a mat")
        assert opened.content(0).annotations.pair_weight == 0.5


def test_class_files_of_shards_are_labels(tmp_path, picture, write_tar):
    members = {}
    for number in range(2):
        members[f"{number}.png"], members[f"{number}.txt"] = picture(number), b"a text"
    members["1.cls"] = b"7\n"
    shard = write_tar(tmp_path / "0.tar", members.items())
    source = open_source(str(shard), ReadingConfig(label_key="cls"))
    assert [source.content(n).annotations.label for n in range(2)] == ["", "7"]
    assert open_source(str(shard)).content(1).annotations == NO_ANNOTATIONS


@pytest.mark.parametrize(
    ("record", "kind", "detail"),
    [
        ({}, "pair_weight", "no weight under 'w'"),
        ({"w": " "}, "pair_weight", "no weight under 'w'"),
        ({"w": "much"}, "pair_weight", "'w' is 'much', not a number"),
        ({"w": True}, "pair_weight", "'w' is true or false, not a number"),
        ({"w": math.nan}, "pair_weight", "'w' is nan; a weight is finite"),
        ({"w": "inf"}, "pair_weight", "'w' is inf; a weight is finite"),
        ({"w": 1, "class": ["a"]}, "label", "'class' is a list, not a text or a number"),
        ({"w": 1, "not": 3}, "hard_negative", "'not' is a number, not a text or a list"),
    ],
)
def test_other_values_are_named(record, kind, detail):
    with pytest.raises(Unusable) as error:
        AnnotationKeys("class", "not", "w").read(record)
    assert error.value.kind == kind and detail in error.value.detail


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), max_size=3))
def test_a_list_written_as_text_is_a_list(texts):
    """NegCLIP's tables hold Python lists."""
    expected = tuple(text.strip() for text in texts if text.strip())
    keys = AnnotationKeys(hard_negative="not")
    for written in (texts, str(texts), json.dumps(texts)):
        assert keys.read({"not": written}).negatives == expected


def test_a_caption_in_brackets_is_a_caption():
    assert AnnotationKeys(hard_negative="n").read({"n": "[a] cat"}) == Annotations(
        negatives=("[a] cat",)
    )
