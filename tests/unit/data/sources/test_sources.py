"""Tables, folders, mixtures, and what opens them."""

import base64
import csv
import json
import pickle
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.opening import open_source
from neuclip.data.samples import SampleError
from neuclip.data.sources import arrow_columns
from neuclip.data.sources.folders import FolderSource
from neuclip.data.sources.image_files import ImageFiles
from neuclip.data.sources.mixture import Mixture
from neuclip.data.sources.shards import ShardIndex
from neuclip.data.sources.source import Texts
from neuclip.data.sources.tables import TableSource
from neuclip.errors import UserError

COUNT = 12


def mixed(factors):
    return ReadingConfig(train_data_upsampling_factors=factors)


@pytest.fixture
def images(tmp_path, picture):
    """Image files 0.png ... 11.png in a folder `images`."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def write_table(path, rows, header=("filepath", "title"), separator="\t"):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


@pytest.fixture
def rows():
    return [(f"images/{number}.png", f"number {number}") for number in range(COUNT)]


def check(source, keys=None):
    """It holds the twelve samples, in order, also in another process."""
    assert len(source) == COUNT
    for each in (source, pickle.loads(pickle.dumps(source))):
        for number in range(COUNT):
            sample = each.read(number)
            assert sample.caption == f"number {number}"
            assert sample.image.getpixel((0, 0)) == (number, 0, 7)
            assert each.sample_id(number) == number
            if keys is not None:
                assert sample.key == each.locate(number)[1] == keys[number]
    assert source.damage == ()


def damage_of(source, position):
    with pytest.raises(SampleError) as error:
        source.read(position)
    return error.value.damage


# --- csv and tsv


@pytest.mark.parametrize(("name", "separator"), [("t.csv", "\t"), ("t.csv", ","), ("t.tsv", "\t")])
def test_table(tmp_path, images, rows, name, separator):
    path = write_table(tmp_path / name, rows, separator=separator)
    source = open_source(str(path))
    assert isinstance(source, TableSource)
    check(source, [row[0] for row in rows])
    assert source.locate(3) == (path, "images/3.png")


def test_table_with_other_columns_and_separator(tmp_path, images, rows):
    table = [(caption, "x", path) for path, caption in rows]
    path = write_table(tmp_path / "t.csv", table, ("words", "n", "where"), ";")
    settings = ReadingConfig(csv_img_key="where", csv_caption_key="words", csv_separator=";")
    check(open_source(str(path), settings))


def test_table_of_another_ending_and_absolute_paths(tmp_path, images, rows):
    table = [(str(tmp_path / path), caption) for path, caption in rows]
    path = write_table(tmp_path / "list.txt", table)
    check(open_source(str(path), ReadingConfig(data_format="csv")))


def test_several_tables(tmp_path, images, rows):
    for number, part in enumerate((rows[:5], rows[5:])):
        write_table(tmp_path / f"{number}.csv", part)
    for spec in (f"{tmp_path}/{{0..1}}.csv", f"{tmp_path}/0.csv::{tmp_path}/1.csv", str(tmp_path)):
        source = open_source(spec)
        check(source)
        assert source.locate(7)[0] == tmp_path / "1.csv"


def test_table_as_spreadsheets_write_it(tmp_path, images):
    text = '\ufefffilepath,title\r\nimages/3.png,"one, ""two""\nthree"\r\n\r\nimages/4.png,x\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    source = open_source(str(tmp_path / "t.csv"))
    assert [source.read(n).caption for n in range(2)] == ['one, "two"\nthree', "x"]


def test_corrupt_rows_give_the_reason(tmp_path, images, picture):
    (images / "bad.png").write_bytes(b"no picture")
    lines = [
        b"filepath\ttitle",
        b"images/none.png\tx",
        b"images/1.png\t ",
        b"images/1.png",
        b"\tx",
        b"images/1.png\tcaf\xe9",
        b"images/bad.png\tx",
        b"images/1.png\tgood",
        b"images/2.png\t" + b"long " * 200_000,
    ]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(lines))
    source = open_source(str(tmp_path / "t.tsv"))
    kinds = [damage_of(source, n) for n in range(6)]
    assert [damage.kind for damage in kinds] == [
        "image_missing",
        "caption_empty",
        "caption_empty",
        "image_missing",
        "caption_encoding",
        "image",
    ]
    assert {damage.shard for damage in kinds} == {str(tmp_path / "t.tsv")}
    assert kinds[0].key == "images/none.png"
    assert source.read(6).caption == "good"
    assert source.read(7).caption.startswith("long long")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is an empty file; expected tar shards"),
        (
            "a,b\n1,2\n",
            r"none of the columns .* for the image; its columns are 'a', 'b': name one with",
        ),
        (
            "image,b\n1,2\n",
            "for the caption; its columns are 'image', 'b': name one with --csv-caption-key",
        ),
        ("image,caption\n", "no rows below"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "t.csv"))


def test_table_flags_that_are_wrong(tmp_path, images, rows):
    path = str(write_table(tmp_path / "t.csv", rows))
    with pytest.raises(
        UserError, match=r"no column 'url' for the image; its columns are 'filepath'"
    ):
        open_source(path, ReadingConfig(csv_img_key="url"))
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="data_size 12 takes the keys of tar shards"):
        open_source(path, ReadingConfig(data_size=12))


@pytest.mark.parametrize("given", ["\t", r"\t", "tab", ";", "|"])
def test_separators_as_typed_in_a_shell(tmp_path, images, rows, given):
    separator = {r"\t": "\t", "tab": "\t"}.get(given, given)
    path = write_table(tmp_path / "t.csv", rows, separator=separator)
    check(open_source(str(path), ReadingConfig(csv_separator=given)))
    check(open_source(str(path)))  # found without the flag, too


@pytest.mark.parametrize("given", ["::", "", r"\n", "\n", '"', "é"])
def test_separators_that_are_not_one_character(given):
    with pytest.raises(ValueError, match="must be one character other than a quote"):
        ReadingConfig(csv_separator=given)


def test_paths_relative_to_the_table_or_to_where_the_user_stands(
    tmp_path, images, rows, monkeypatch
):
    (tmp_path / "data" / "csv").mkdir(parents=True)
    table = write_table(tmp_path / "data" / "csv" / "t.csv", rows)
    monkeypatch.chdir(tmp_path)
    check(open_source("data/csv/t.csv"))
    monkeypatch.chdir(tmp_path / "data")
    message = (
        rf"none of the 12 image paths tried exists; the first is 'images/0\.png', looked for in "
        rf"{table.parent} and in the current folder {tmp_path / 'data'}: paths must be absolute"
    )
    with pytest.raises(UserError, match=message):
        open_source(str(table))


@pytest.mark.parametrize("place", ["set/captions.txt", "set/annotations/captions.csv"])
def test_images_in_a_folder_inside_or_beside_that_of_the_table(
    tmp_path, images, rows, caplog, place
):
    """As in Flickr8k: `captions.txt` beside `Images`; as in COCO: `annotations` beside it."""
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    images.rename(tmp_path / "set" / "Images")
    plain = [(path.removeprefix("images/"), caption) for path, caption in rows]
    table = write_table(tmp_path / place, plain, separator=",")
    with caplog.at_level("INFO", "neuclip"):
        source = open_source(str(table))
    assert [source.read(n).caption for n in range(len(source))] == [text for _, text in rows]
    assert f"image paths are relative to {tmp_path / 'set' / 'Images'}" in caplog.text
    shutil.copytree(tmp_path / "set" / "Images", tmp_path / "set" / "copy")
    with pytest.raises(UserError, match=r"exist in .*/set/Images and in .*/set/copy: start in"):
        open_source(str(table))


def test_a_table_as_flickr30k_has_it(tmp_path, images, rows):
    lines = [f"{path}| 0| {caption}" for path, caption in rows]
    table = tmp_path / "results.csv"
    table.write_text("\n".join(["image_name| comment_number| comment", *lines]))
    check(open_source(str(table)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://host/a.jpg", "the image column holds addresses: download them first"),
        ("imgs\\a.jpg", "they contain backslashes, which must be /"),
        ("x" * 100_000, r"the first is 'x{77}\.\.\.', looked for in"),
        (base64.b64encode(b"\xff\xd8\xff" * 99).decode(), "as base64 text .a JPEG image."),
    ],
)
def test_values_that_are_not_paths(tmp_path, value, message):
    path = write_table(tmp_path / "t.csv", [(value, "words")])
    with pytest.raises(UserError, match=message):
        open_source(str(path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("URL", "TEXT"), "the images are addresses: download them first"),
        (("a dog", "https://host/a.jpg"), "the first line must hold the names of the columns"),
        (("x" * 10_000, "y"), r"its columns are 'x{37}\.\.\.', 'y': name one"),
        (tuple("abcdefghijklmnop"), "'l' and 4 more: name one with"),
    ],
)
def test_columns_that_are_not_known(tmp_path, header, message):
    path = write_table(tmp_path / "t.csv", [("x",) * len(header)], header)
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def test_names_of_columns_in_any_case(tmp_path, images, rows):
    check(open_source(str(write_table(tmp_path / "t.csv", rows, ("Image", " Caption")))))


def test_several_caption_columns(tmp_path, images, rows):
    table = [(*row, f"{row[1]} again", "") for row in rows]
    path = write_table(tmp_path / "t.csv", table, ("filepath", "a", "b", "c"))
    source = open_source(str(path), ReadingConfig(csv_caption_key="a,b,c"))
    assert source.read(3).captions == ("number 3", "number 3 again")
    check(source)


def test_caption_key_names_a_column_or_says_that_it_does_not(tmp_path, images, rows):
    table = [(*row, f"{row[1]} again") for row in rows]
    path = str(write_table(tmp_path / "t.csv", table, ("filepath", "title", "long")))
    source = open_source(path, ReadingConfig(caption_key="none;long"))
    assert source.read(3).captions == ("number 3 again",)
    source = open_source(path, ReadingConfig(caption_key="none"))
    assert source.read(3).captions == ("number 3",)
    assert "captions from 'title' ('none' of --caption-key is for .json files)" in source.opened
    source = open_source(path, ReadingConfig(caption_key="long", csv_caption_key="title"))
    assert "captions from 'title' ('long' of --caption-key is" in source.opened
    with pytest.raises(
        UserError, match=r"names 2 columns .* draw from them with --caption-keys lo"
    ):
        open_source(path, ReadingConfig(caption_key="long;title"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path, images, encoding):
    text = "filepath,title\nimages/3.png,café\n"
    (tmp_path / "t.csv").write_text(text, encoding=encoding)
    source = open_source(str(tmp_path / "t.csv"))
    assert source.read(0).caption == "café"
    assert ("UTF-16" in source.opened) == encoding.startswith("utf-16")


def test_latin1_is_named(tmp_path, images):
    (tmp_path / "t.csv").write_bytes(b"filepath,title\nimages/3.png,caf\xe9\nimages/4.png,x\n")
    source = open_source(str(tmp_path / "t.csv"))
    assert "1 caption of " in source.unused[0]
    assert "iconv -f latin1 -t utf8" in source.unused[0]


def test_a_lone_quote_costs_no_row(tmp_path, images, rows):
    rows[5] = (rows[5][0], '"number 5')
    text = "\n".join("\t".join(row) for row in [("filepath", "title"), *rows])
    (tmp_path / "t.tsv").write_text(text)
    source = open_source(str(tmp_path / "t.tsv"))
    assert [source.read(n).caption for n in range(COUNT)] == [row[1] for row in rows]
    assert "quotes are read as text (line 7: a quote opens a field and is not clo" in source.opened
    (tmp_path / "t.csv").write_text(text.replace("\t", ",") + '\nimages/1.png,"red, blue"\n')
    with pytest.raises(UserError, match=r"t\.csv, line 7: .*: rows would be lost"):
        open_source(str(tmp_path / "t.csv"))


def test_field_limit_of_csv_is_left_alone(tmp_path, images, rows):
    before = csv.field_size_limit()
    open_source(str(write_table(tmp_path / "t.csv", rows)))
    assert csv.field_size_limit() == before


# --- folders


def test_folder(tmp_path, images, picture):
    for number in range(COUNT):
        (images / f"{number}.png").rename(images / f"{number:02d}.png")
        (images / f"{number:02d}.txt").write_text(f" number {number}\n")
    (images / ".hidden.png").write_bytes(b"x")
    source = open_source(str(images))
    assert isinstance(source, FolderSource)
    check(source, [f"{number:02d}" for number in range(COUNT)])


def test_nested_folder_with_json(tmp_path, images, picture):
    for number in range(COUNT):
        below = images / "ab"[number // 6]
        below.mkdir(exist_ok=True)
        (images / f"{number}.png").rename(below / f"{number:02d}.v1.PNG")
        (below / f"{number:02d}.v1.json").write_text(json.dumps({"words": f"number {number}"}))
    source = open_source(str(images), ReadingConfig(caption_key="words"))
    check(source)
    assert source.read(7).key == "b/07.v1"


def test_images_of_one_name_have_keys_of_their_own(tmp_path, images):
    """Each is found by its key, and has the caption of its stem, as open_clip's shards would."""
    content = (images / "0.png").read_bytes()
    names = ("cat.PNG", "cat.png", "dog.png", "x/cat.png", "cow.png", "cow.png.png", "hen.v1.png")
    for name in names:
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"a {path.stem}")
    source = open_source(str(tmp_path / "pets"))
    found = {source.read(n).key: source.read(n).caption for n in range(len(source))}
    assert found == {
        "cat.PNG": "a cat", "cat.png": "a cat", "dog": "a dog", "x/cat": "a cat",
        "cow": "a cow", "cow.png.png": "a cow.png", "hen.v1": "a hen.v1",
    }  # fmt: skip
    assert [source.locate(n)[1] for n in range(len(source))] == list(found)


_WORDS = st.lists(st.sampled_from(["a", "b", "png", "jpg"]), min_size=2, max_size=4)


@given(st.sets(_WORDS.map(".".join)))
def test_keys_of_files_are_as_different_as_their_names(names):
    files = ImageFiles()
    files.extend(names, "below/")
    assert len({files.key(position) for position in range(len(files))}) == len(names)


def test_damage_in_a_folder(images):
    for number, caption in enumerate((b"fine", b"caf\xe9", b" ")):
        (images / f"{number}.txt").write_bytes(caption)
    source = open_source(str(images))
    kinds = Counter(damage_of(source, n).kind for n in range(len(source)) if n != 0)
    assert kinds == {"caption_missing": 9, "caption_encoding": 1, "caption_empty": 1}
    assert source.read(0).caption == "fine"


def test_folders_that_are_no_data(tmp_path, images):
    with pytest.raises(UserError, match=r"images without captions: 0\.png needs 0\.txt beside it"):
        open_source(str(images))
    with pytest.raises(UserError, match=r"contains no \.tar shards, tables or images"):
        (tmp_path / "empty").mkdir()
        open_source(str(tmp_path / "empty"))
    (tmp_path / "pool" / "shards").mkdir(parents=True)
    (tmp_path / "pool" / "shards" / "0.tar").touch()
    with pytest.raises(UserError, match=r"has its tar shards in .*/pool/shards: give that folder"):
        open_source(str(tmp_path / "pool"))


def test_texts_of_an_evaluation_set_are_not_captions(images):
    for name in ("classnames.txt", "zeroshot_classification_templates.txt", "other.txt"):
        (images / name).write_text("cat")
    (line,) = open_source(str(images), captions="optional").unused
    assert "other.txt" in line
    assert "classnames" not in line


# --- parquet and Hugging Face datasets


def test_without_pyarrow_the_message_names_the_package(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(arrow_columns.importlib, "import_module", missing)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    for name in ("t.parquet", "set"):
        with pytest.raises(UserError, match=r"pip install 'neuclip\[parquet\]'"):
            open_source(str(tmp_path / name))


@pytest.fixture
def pa():
    pytest.importorskip("pyarrow.parquet")
    return pytest.importorskip("pyarrow")


@pytest.fixture
def columns(pa, images):
    """The twelve samples as columns, with the image stored in three ways."""
    contents = [(images / f"{number}.png").read_bytes() for number in range(COUNT)]
    paths = [f"images/{number}.png" for number in range(COUNT)]
    stored = {
        "path": pa.array(paths),
        "bytes": pa.array(contents, pa.binary()),
        "structure": pa.array([{"bytes": each, "path": None} for each in contents]),
        "structure of paths": pa.array([{"bytes": None, "path": path} for path in paths]),
    }
    captions = pa.array([f"number {number}" for number in range(COUNT)])
    return lambda way: pa.table({"image": stored[way], "caption": captions})


WAYS = ["path", "bytes", "structure", "structure of paths"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [None, 0, 1])
def test_parquet(pa, tmp_path, columns, way, window):
    for number in range(2):
        part = columns(way).slice(number * 6, 6)
        pa.parquet.write_table(part, tmp_path / f"{number}.parquet", row_group_size=4)
    for spec in (str(tmp_path), f"{tmp_path}/{{0..1}}.parquet"):
        source = open_source(spec, ReadingConfig(shuffle_window=window))
        check(source)
        assert source.locate(7)[0] == tmp_path / "1.parquet"
    if way == "bytes":
        assert [source.read(n).key for n in (0, 5, 6, 11)] == ["0", "5", "0", "5"]
        assert source.layout.ends.tolist() == [4, 6, 10, 12]


def test_parquet_keeps_few_row_groups(pa, tmp_path, columns):
    pa.parquet.write_table(columns("bytes"), tmp_path / "0.parquet", row_group_size=1)
    source = open_source(str(tmp_path), ReadingConfig(shuffle_window=2))
    check(source)
    assert len(source._loaded) == 2


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_of_paths_and_nulls(pa, tmp_path, images, rows, kind):
    kind = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    paths = pa.array([row[0] for row in rows]).cast(kind)
    captions = pa.array([None, *(row[1] for row in rows[1:])]).cast(kind)
    table = pa.table({"filepath": paths, "title": captions})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    source = open_source(str(tmp_path / "t.parquet"))
    assert isinstance(source, TableSource)
    assert [source.read(n).caption for n in range(1, COUNT)] == [row[1] for row in rows[1:]]
    assert [source.read(n).key for n in range(1, COUNT)] == [row[0] for row in rows[1:]]
    assert damage_of(source, 0).kind == "caption_empty"


def test_parquet_of_paths_and_lists(pa, tmp_path, images, rows):
    captions = [[row[1], "more"] for row in rows[:-2]] + [[], None]
    table = pa.table({"filepath": [row[0] for row in rows], "title": captions})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    source = open_source(str(tmp_path / "t.parquet"), captions="optional")
    assert source.read(7).captions == ("number 7", "more")
    assert [source.read(n).captions for n in (10, 11)] == [(), ()]


def test_parquet_of_base64(pa, tmp_path, images, columns):
    contents = [(images / f"{number}.png").read_bytes() for number in range(COUNT)]
    encoded = [base64.b64encode(each).decode() for each in contents]
    captions = [f"number {number}" for number in range(COUNT)]
    pa.parquet.write_table(
        pa.table({"image": encoded, "text": captions}), tmp_path / "t.parquet", row_group_size=5
    )
    source = open_source(str(tmp_path / "t.parquet"))
    check(source)
    assert source.read(4).key == "4"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", [1, 2], r"'text' holds values of type int64 \(labels\?\), not captions"),
        ("text", [{"raw": "x"}] * 2, "'text' holds values of type struct<raw: string>, not capt"),
        ("text", [[{"raw": "x"}]] * 2, "not captions: a text or a list of texts; .*--csv-caption"),
        ("image", [[1, 2]] * 2, "'image' holds values of type list<.*>, not images: paths, bytes"),
        ("image", [1.5, 2.5], "holds values of type double, not images"),
    ],
)
@pytest.mark.parametrize("way", ["parquet", "dataset"])
def test_types_are_checked_when_a_source_is_opened(pa, tmp_path, column, values, message, way):
    table = pa.table(
        {"image": [b"x", b"y"], "text": ["a", "b"], "other": ["c", "d"]} | {column: values}
    )
    if way == "parquet":
        pa.parquet.write_table(table, tmp_path / "set.parquet")
    else:
        write_dataset(pa, tmp_path / "set.parquet", [table])
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path / "set.parquet"))
    assert column == "image" or "text columns: 'other'" in str(error.value)


def test_parquet_tables_with_other_names_of_columns(pa, tmp_path, columns):
    for number, name in enumerate(("caption", "text")):
        part = columns("bytes").slice(number * 6, 6).rename_columns(["image", name])
        pa.parquet.write_table(part, tmp_path / f"{number}.parquet")
    check(open_source(str(tmp_path)))


def test_parquet_that_is_none(pa, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no, not really")
    with pytest.raises(UserError, match=r"t\.parquet cannot be read as a parquet table"):
        open_source(str(tmp_path / "t.parquet"))


def write_dataset(pa, folder, tables):
    """What `Dataset.save_to_disk` leaves behind."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("way", WAYS)
def test_hugging_face_dataset(pa, tmp_path, images, columns, way):
    table = columns(way)
    write_dataset(pa, tmp_path / "set", [table.slice(0, 7), table.slice(7)])
    images.rename(tmp_path / "set" / "images")
    check(open_source(str(tmp_path / "set")), [str(number) for number in range(COUNT)])


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "caption_empty"), ([], "caption_empty"), (["a", "b"], "a")]
)
def test_captions_of_datasets(pa, tmp_path, picture, value, kind):
    caption = pa.array([value], pa.list_(pa.string()) if isinstance(value, list) else pa.string())
    table = pa.table({"image": pa.array([picture(1)], pa.binary()), "caption": caption})
    write_dataset(pa, tmp_path / "set", [table])
    source = open_source(str(tmp_path / "set"))
    if kind == "a":
        assert source.read(0).caption == "a"
    else:
        assert damage_of(source, 0).kind == kind


# --- several sources


@pytest.fixture
def tars(tmp_path, write_tar, pairs):
    write_tar(tmp_path / "a" / "0.tar", pairs(range(5)))
    write_tar(tmp_path / "b" / "0.tar", pairs(range(100, 103)))
    write_tar(tmp_path / "b" / "1.tar", pairs(range(103, 104)))
    return tmp_path


def transform(image):
    return torch.zeros(3, 1, 1)


def tokenize(texts):
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def numbers(source, batch_size, **more):
    loader = TrainLoader(source, transform, tokenize, LoaderSettings(batch_size, **more))
    return [int(key) for batch in loader for key in batch.keys]


def test_sources_without_factors_are_one(tars):
    source = open_source(f"{tars}/a::{tars}/b")
    assert isinstance(source, ShardIndex)
    assert sorted(numbers(source, 3)) == [*range(5), *range(100, 104)]


@pytest.mark.parametrize("window", [0, 1, 2])
def test_factors(tars, window):
    source = open_source(f"{tars}/a::{tars}/b", mixed("1::2"))
    assert isinstance(source, Mixture)
    assert len(source) == 9
    counts = Counter(numbers(source, 13, window=window))
    assert counts == {**dict.fromkeys(range(5), 1), **dict.fromkeys(range(100, 104), 2)}
    loader = TrainLoader(source, transform, tokenize, LoaderSettings(6, window=window))
    assert loader.description == (
        "an epoch is 12 samples: 2 steps of 6; that is 12 visits of a round; a round is 13 visits: "
        f"{tars}/a/0.tar: each of 5 samples 1 time, {tars}/b: each of 4 samples 2 times"
    )


def test_ids_of_a_mixture(tars):
    source = open_source(f"{tars}/a::{tars}/b", mixed("1::2"))
    assert [source.sample_id(n) for n in range(9)] == list(range(9))
    settings = ReadingConfig(train_data_upsampling_factors="1::2", data_size=200)
    by_key = open_source(f"{tars}/a::{tars}/b", settings)
    assert [by_key.sample_id(n) for n in range(9)] == [*range(5), *range(100, 104)]
    assert [by_key.read(n).caption for n in (0, 5)] == ["number 0", "number 100"]
    assert by_key.locate(8) == (tars / "b" / "1.tar", "000103")


def test_sources_of_different_kinds(tars, images, rows):
    table = write_table(tars / "t.csv", rows)
    source = open_source(f"{table}::{tars}/b", mixed("0.5::1"))
    seen = [source.read(n).caption for n in range(len(source))]
    assert seen == [f"number {n}" for n in [*range(COUNT), *range(100, 104)]]
    loader = TrainLoader(source, transform, tokenize, LoaderSettings(10))
    (batch,) = loader
    assert sum(caption in {f"number {n}" for n in range(COUNT)} for caption in batch.captions) == 6
    assert len(open_source(f"{table}::{tars}/b")) == 16


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ("1", "1 factor for 2 sources"),
        ("1::x", "expected numbers joined by '::'"),
        ("1::0", "must be above 0"),
        ("1::-2", "must be above 0"),
        ("nan::1", "must be above 0"),
    ],
)
def test_factors_that_are_wrong(tars, factors, message):
    with pytest.raises(UserError, match=message):
        open_source(f"{tars}/a::{tars}/b", mixed(factors))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [0, 1, 2])
def test_mixture_resumes_with_fewer_shards_than_workers_and_ranks(tars, workers, window):
    source = open_source(f"{tars}/a::{tars}/b", mixed("1.5::2"))
    whole = TrainLoader(source, transform, tokenize, LoaderSettings(4, window=window))
    expected = [batch.keys for batch in whole]
    assert len(expected) == 3
    for step in range(3):
        parts = []
        for rank in range(4):
            settings = LoaderSettings(1, rank, 4, workers=workers, window=window)
            loader = TrainLoader(source, transform, tokenize, settings)
            loader.set_position(0, step)
            parts.append([batch.keys[0] for batch in loader])
        assert [list(batch) for batch in zip(*parts, strict=True)] == expected[step:]


def test_texts():
    values = ["", "plain", "\u00e9\u4e2d", "caf\udce9", "x" * 10_000]
    texts = Texts(values)
    assert len(texts) == 5
    assert [texts[n] for n in range(5)] == values
