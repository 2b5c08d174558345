"""One bad sample or shard is damage or a refusal, whatever it holds, soon and in little memory."""

import gzip
import io
import json
import os
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.decode import ImageDecoder
from neuclip.data.opening import open_source
from neuclip.data.remote.cache import RemoteShard, ShardCache
from neuclip.data.remote.manifest import parse_manifest
from neuclip.data.remote.remote_shards import _check_room
from neuclip.data.samples import SampleError, Unusable
from neuclip.data.sources import tar_headers
from neuclip.data.sources.arrow import RowRule
from neuclip.data.sources.shards import build_index
from neuclip.data.sources.tar_index import index_shard
from neuclip.errors import UserError

GOOD = [("good.png", 1), ("good.txt", b"good")]


@pytest.fixture(autouse=True)
def soon():
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def outcomes(source) -> list[str]:
    """The first caption of each sample, or the kind of its damage."""
    found: list[str] = []
    for position in range(len(source)):
        try:
            found.append(source.read(position).caption)
        except SampleError as error:
            found.append(error.damage.kind)
    return found


# members of shards -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"1" * 5000, b"1" + b"0" * 30, "٣".encode(), "²".encode(), b"-1", b"1.0", b"\xff"]
)
def test_classes_that_are_no_index(content, tmp_path, write_tar, picture):
    members = [("a.png", picture(1)), ("a.txt", b"a"), ("a.cls", content)]
    shard = write_tar(tmp_path / "0.tar", [*members, ("b.png", picture(2)), ("b.txt", b"b")])
    assert outcomes(build_index([shard])) == ["class", "b"]


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (b'{"caption":' + b"[" * 200_000, "caption_json"),
        (b'{"caption":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "caption_json"),
        (b'{"more":' + b"[" * 300 + b"]" * 300 + b', "caption": "a"}', "caption_json"),
        (b'{"caption": "\\ud800"}', "caption_encoding"),
        (b'{"caption": ["a", "\\udfff x"]}', "caption_encoding"),
        (b'{"caption": ' + b"1" * 5000 + b"}", "caption_type"),
        (b'{"caption": NaN}', "caption_type"),
        (b'{"id": ' + b"1" * 5000 + b', "caption": "a"}', "a"),
        (b'{"caption": "a", "caption": "b"}', "b"),
    ],
)
def test_json_of_samples(content, outcome, tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.json", content)])
    rule = ReadingConfig(caption_key="caption")
    assert outcomes(open_source(str(shard), rule)) == [outcome]


def sized_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """The header of a member of any size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("name", "size"), [("b.png", 2**32 + 5), ("b.txt", 2**23), ("b.npy", 2**27)]
)
def test_members_that_are_too_large_are_left_out(name, size, tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.txt", b"a")])
    content = shard.read_bytes()[: 4 * 512]
    with shard.open("wb") as file:  # sparse
        file.write(content + sized_header(name, size))
        file.seek(size + -size % 512, os.SEEK_CUR)
        file.write(bytes(1024))
    source = build_index([shard])
    (damage,) = source.damage
    assert damage.kind == "member_size"
    assert damage.key == name and f"{size:,} bytes are more than" in damage.detail
    assert outcomes(source) == ["a"]


@pytest.mark.parametrize("size", [2**33, 2**63, 2**80, -1, -(2**40)])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_sizes_beyond_the_end_of_a_shard(size, kind, tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.txt", b"a")])
    header = bytearray(sized_header("b.png", 1, kind))
    header[124:136] = b"\x80" + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.write_bytes(shard.read_bytes()[: 4 * 512] + header + bytes(1024))
    source = build_index([shard])
    assert "is truncated at byte" in source.damage[0].detail
    assert outcomes(source) == ["a"]


def pax(content: bytes) -> bytes:
    """An extended header."""
    return sized_header("x", len(content), b"x") + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content",
    [
        b"1" * 5000 + b" path=x\n",
        b"9" * 19 + b" path=x\n",
        "²".encode() + b" path=x\n",
        b"0 path=x\n",
        b"-5 path=x\n",
        b"5 a=\n" * 100_000 + b"10 path=x\n",
        b" path=x\n" * 60_000,
    ],
)
def test_extended_headers(content, tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.txt", b"a")])
    shard.write_bytes(pax(content) + shard.read_bytes())
    with shard.open("rb") as file:
        paths = [member.path for member in tar_headers.members(file, shard.stat().st_size)]
    assert paths[1:] == ["a.txt"]


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_an_extended_header_of_megabytes_ends_the_shard(kind, tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.txt", b"a")])
    head = shard.read_bytes()[: 4 * 512]
    shard.write_bytes(
        head + sized_header("x", 2**22, kind) + b"5 a=\n" * (2**22 // 5) + bytes(2048)
    )
    source = build_index([shard])
    assert "has an extended header of 4194304 bytes" in source.damage[0].detail
    assert outcomes(source) == ["a"]


def test_one_very_long_key_beside_many_long_ones(tmp_path, write_tar):
    members = [(f"{'k' * 150}{number}.txt", b"a") for number in range(300)]
    members.insert(5, ("k" * 900_000 + ".txt", b"a"))
    shard = write_tar(tmp_path / "0.tar", members, tarfile.PAX_FORMAT)
    for _ in range(2):  # scanned, then loaded
        index = index_shard(shard)
        assert len(index.long_keys) == 300
        assert index.findings[0][0] == "member_name"
    assert (tmp_path / ".neuclip" / "0.tar.index.npz").stat().st_size < 200_000


def replaced(**changes):
    def change(stored):
        stored.update(changes)

    return change


@pytest.mark.parametrize(
    "change",
    [
        replaced(blocks=np.zeros((2, 4), np.uint32)),
        replaced(blocks=np.zeros((2, 5), np.int64)),
        replaced(sizes=np.zeros((9, 5), np.uint32)),
        replaced(integer_keys=np.zeros((2, 1), np.int64)),
        replaced(rest=np.zeros((3, 3), np.int64)),
        replaced(rest=np.frombuffer(b"[" * 100_000, np.uint8)),
        replaced(rest=np.frombuffer(b"[1, 2]", np.uint8)),
        replaced(rest=np.frombuffer(b"{}", np.uint8)),
        replaced(rest=np.zeros(10_000_000, np.uint8)),
        lambda stored: stored.pop("sizes"),
    ],
)
def test_an_index_of_others_is_checked_and_replaced(change, tmp_path, write_tar, pairs):
    shard = write_tar(tmp_path / "0.tar", pairs(range(2)))
    good, place = index_shard(shard), tmp_path / ".neuclip" / "0.tar.index.npz"
    with np.load(place) as file:
        stored = dict(file)
    change(stored)
    np.savez_compressed(place, **stored)
    again = index_shard(shard)
    assert np.array_equal(again.blocks, good.blocks) and np.array_equal(again.sizes, good.sizes)
    with np.load(place) as file:
        assert np.array_equal(file["blocks"], good.blocks)


# tables and folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_may_name_anything(kind, tmp_path, picture):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**33)
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "link.png").symlink_to("/dev/zero")
    names = ["a.png", "/dev/zero", "/dev/stdin", "pipe.png", "folder.png", "link.png", "large.png"]
    table = tmp_path / f"t.{kind}"
    if kind == "csv":
        table.write_text("image,caption\n" + "".join(f"{name},c\n" for name in names))
    elif kind == "jsonl":
        lines = (json.dumps({"image": name, "caption": "c"}) + "\n" for name in names)
        table.write_text("".join(lines))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"image": names, "caption": ["c"] * 7}), table)
    found = outcomes(open_source(str(table)))
    assert found == ["c", *["image_missing"] * 5, "image_too_large"]


def test_captions_of_folders_are_regular_files_of_some_size(tmp_path, picture):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "c.txt")
    with (tmp_path / "d.txt").open("wb") as file:
        file.truncate(2**33)
    assert outcomes(open_source(str(tmp_path))) == ["a caption", *["caption_missing"] * 3]


@pytest.mark.parametrize("name", ["t.csv", "t.tar", "t.jsonl", "t.parquet", "t"])
def test_data_that_are_a_pipe_or_device_are_refused(name, tmp_path):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, Path("/dev/zero")):
        with pytest.raises(UserError):
            open_source(str(path))


@pytest.mark.parametrize("size", [70_000_000, 200_000_000])
def test_compressed_tables_that_unpack_without_end(size, tmp_path):
    packed = io.BytesIO()
    with gzip.open(packed, "wb", compresslevel=1) as file:
        file.write(b"filepath,title\n")
        for _ in range(size // 10**6):
            file.write(b"a" * 10**6)
    (tmp_path / "t.csv").write_bytes(packed.getvalue())
    with pytest.raises(UserError, match="unpack to more than"):
        open_source(str(tmp_path / "t.csv"))


# Arrow and parquet -------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "text"])
@pytest.mark.parametrize("value", [-1, 2**30, 2**31 - 1])
def test_arrow_offsets_are_checked_on_opening(column, value, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    offsets = np.array([0, 1, 2, 3], np.int32)
    kinds = {"image": arrow.binary(), "text": arrow.string()}
    columns = {}
    for name, kind in kinds.items():
        used = offsets.copy()
        if name == column:
            used[2] = value
        buffers = [None, arrow.py_buffer(used.tobytes()), arrow.py_buffer(b"abc")]
        columns[name] = arrow.Array.from_buffers(kind, 3, buffers)
    table = arrow.table(columns)
    with (tmp_path / "d.arrow").open("wb") as file, arrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="the dataset cannot be read"):
        open_source(str(tmp_path))


def test_columns_of_different_lengths():
    """As a damaged parquet table may have them."""
    arrow = pytest.importorskip("pyarrow")
    rule = RowRule.of(ReadingConfig(), "required", has_captions=True)
    columns = [arrow.chunked_array([["a.jpg", "b.jpg"]]), arrow.chunked_array([["one"]])]
    assert rule.values(columns, ["image", "text"], 0) == {"image": "a.jpg", "text": "one"}
    with pytest.raises(Unusable, match="ends before row 1"):
        rule.values(columns, ["image", "text"], 1)


@pytest.mark.parametrize("name", [b"text", b"image"])
def test_names_of_arrow_columns_that_are_not_utf8(tmp_path, name):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"image": [b"x"], "text": ["y"]})
    buffer = io.BytesIO()
    with arrow.ipc.new_stream(buffer, table.schema) as out:
        out.write_table(table)
    (tmp_path / "d.arrow").write_bytes(buffer.getvalue().replace(name, b"\xa0" + name[1:]))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="not UTF-8"):
        open_source(str(tmp_path))


def test_parquet_texts_that_are_not_utf8_are_damage(tmp_path, picture):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffers = [
        None,
        arrow.py_buffer(np.array([0, 1, 2], np.int32).tobytes()),
        arrow.py_buffer(b"a\xff"),
    ]
    texts = arrow.Array.from_buffers(arrow.string(), 2, buffers)
    table = arrow.table({"image": [picture(1), picture(2)], "text": texts})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert outcomes(open_source(str(tmp_path / "t.parquet"))) == ["a", "caption_encoding"]


def test_parquet_with_more_rows_than_its_bytes_can_hold(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = arrow.DictionaryArray.from_arrays(np.zeros(10_500_000, np.int8), ["a.png"])
    parquet.write_table(arrow.table({"image": rows}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="10,500,000 rows in"):
        open_source(str(tmp_path / "t.parquet"), captions="optional")


# images that take long ---------------------------------------------------------------------------


def many_scans(side: int, scans: int, **options) -> bytes:
    """A JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "jpeg", **options)
    content = buffer.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * scans + b"\xff\xd9"


def separate_scans(side: int, scans: int) -> bytes:
    """A JPEG that is not progressive, with a scan that has one component, repeated."""
    content = many_scans(side, 0)
    head = content[: content.rfind(b"\xff\xda")]
    return head + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00" * scans + b"\xff\xd9"


@pytest.mark.parametrize(
    "content",
    [
        many_scans(2000, 1000, progressive=True),
        many_scans(2000, 1000, progressive=True, subsampling=0),
        separate_scans(2000, 1000),
    ],
    ids=["progressive", "444", "separate"],
)
def test_jpegs_with_very_many_scans(content):
    with pytest.raises(Unusable, match="scans of 4,000,000 pixels") as caught:
        ImageDecoder()(content)
    assert caught.value.kind == "image_too_large"


@pytest.mark.parametrize(
    "content",
    [
        many_scans(2000, 20, progressive=True),
        many_scans(64, 500, progressive=True),
    ],
    ids=["progressive", "small"],
)
def test_jpegs_with_some_scans_are_decoded(content):
    assert ImageDecoder(smallest=32)(content).mode == "RGB"


def run_length_bitmap(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 2, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1080, 0, 0, 1078) + head + bytes(1024) + b"\0\1"


@pytest.mark.parametrize(
    "content",
    [
        run_length_bitmap(3000, 3000),
        b"P3\n3000 3000\n255\n1 2 3",
        b"P1\n3000 3000\n1 0",
        b"P2\n3000 3000\n255\n1",
        b"P6\n3000 3000\n100\n" + bytes(100),
        b"P5\n3000 3000\n1000\n" + bytes(100),
    ],
    ids=["bmp", "P3", "P1", "P2", "P6", "P5"],
)
def test_formats_that_python_decodes_have_fewer_pixels(content):
    with pytest.raises(Unusable, match=r"9,000,000 pixels of a form of (BMP|PPM)") as caught:
        ImageDecoder()(content)
    assert caught.value.kind == "image_too_large"


def test_forms_that_decode_fast_keep_their_limit():
    buffer = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(buffer, "ppm")
    assert ImageDecoder()(buffer.getvalue()).size == (1500, 1500)
    assert ImageDecoder()(b"P3\n2 1\n255\n1 2 3 4 5 6").size == (2, 1)


@pytest.mark.parametrize(
    "entry",
    [
        {"size": 10, "samples": 11},
        {"size": 2**70, "samples": 1},
        {"size": 10, "samples": 10**30},
        {"size": -1, "samples": 0},
        {"size": 10, "samples": True},
        {"size": 10 * 1024, "samples": 11},
    ],
)
def test_manifests_with_impossible_numbers(entry):
    shard = {"name": "0.tar", "sha256": "ab", **entry}
    with pytest.raises(ValueError, match=r"invalid shard entry|not a manifest"):
        parse_manifest(json.dumps({"version": 1, "shards": [shard]}))


@pytest.mark.parametrize("samples", [[2**27], [2**25] * 4])
@pytest.mark.parametrize("window", [0, 4])
def test_manifests_with_more_samples_than_memory(samples, window, tmp_path):
    shards = [RemoteShard("http://127.0.0.1/0.tar", samples=number) for number in samples]
    with pytest.raises(UserError, match="shuffled together"):
        _check_room(shards, ShardCache(tmp_path, 2**40), window)
    _check_room(
        [RemoteShard("http://127.0.0.1/0.tar", samples=2**20)] * 40, ShardCache(tmp_path, 2**40), 4
    )


# files outside of a table's folder ----------------------------------------------------------------


def test_paths_that_lead_out_of_a_tables_folder_are_told(tmp_path, picture, caplog):
    caplog.set_level("INFO", "neuclip")
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "out.png").write_bytes(picture(1))
    (inside / "a..b.png").write_bytes(picture(2))
    names = [
        "a..b.png",
        "../out.png",
        str(tmp_path / "out.png"),
        str(inside / "a..b.png"),
        "x/../a..b.png",
    ]
    for table, text in (
        ("t.csv", "filepath,title\n" + "".join(f"{name},x\n" for name in names)),
        ("t.jsonl", "".join(json.dumps({"image": name, "text": "x"}) + "\n" for name in names)),
    ):
        (inside / table).write_text(text)
        caplog.clear()
        open_source(str(inside / table))
        assert f"2 of 5 image paths lead out of {inside}, such as ../out.png" in caplog.text
    (inside / "t.csv").write_text("filepath,title\na..b.png,x\n")
    caplog.clear()
    open_source(str(inside / "t.csv"))
    assert "lead out" not in caplog.text
