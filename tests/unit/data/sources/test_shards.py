import io
import json
import os
import pickle
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neuclip.data.captions import CaptionRule
from neuclip.data.samples import SampleError
from neuclip.data.sources import shards, tar_headers, tar_index
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.errors import UserError

BY_KEY = CaptionRule.for_key("caption")

# --- patterns


def _touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_pattern_with_braces_keeps_the_leading_zeros(tmp_path):
    expected = _touch(tmp_path, "0008.tar", "0009.tar", "0010.tar")
    assert expand_patterns(f"{tmp_path}/00{{08..10}}.tar") == expected


def test_patterns_joined_keep_their_order(tmp_path):
    b, a = _touch(tmp_path, "b.tar", "a.tar")
    assert expand_patterns(f"{b}::{a}") == [b, a]


def test_folder_stands_for_its_tars_sorted(tmp_path):
    _touch(tmp_path, "2.tar", "1.tar", "1.txt")
    assert [path.name for path in expand_patterns(str(tmp_path))] == ["1.tar", "2.tar"]


@pytest.mark.parametrize("pattern", ["{dir}/none.tar", "{dir}/{{0..3}}.tar", "{dir}", ""])
def test_nothing_matches(tmp_path, pattern):
    pattern = pattern.format(dir=tmp_path)
    with pytest.raises(UserError, match="no shard matches the pattern") as error:
        expand_patterns(pattern)
    assert repr(pattern) in str(error.value)


def test_some_shards_missing_are_named(tmp_path):
    _touch(tmp_path, "0.tar", "2.tar")
    with pytest.raises(UserError, match=r"1 of 3 shards .*do not exist: .*/1\.tar"):
        expand_patterns(f"{tmp_path}/{{0..2}}.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s3://bucket/{0..3}.tar", "remote shards cannot be read here"),
        ("pipe:cat x.tar", "remote shards cannot be read here"),
        ("a/{0..3.tar", "unbalanced braces"),
    ],
)
def test_patterns_that_cannot_be_read(pattern, message):
    with pytest.raises(UserError, match=message):
        expand_patterns(pattern)


# --- samples


def test_reads_what_was_written(tmp_path, write_tar, pairs):
    paths = [
        write_tar(tmp_path / "0.tar", pairs(range(3))),
        write_tar(tmp_path / "1.tar", pairs(range(3, 5))),
    ]
    index = build_index(paths)
    assert len(index) == 5
    assert [index.sample_id(n) for n in range(len(index))] == [0, 1, 2, 3, 4]
    for number in range(5):
        sample = index.read(number)
        assert (sample.key, sample.caption) == (f"{number:06d}", f"number {number}")
        assert sample.class_index is None
        assert sample.image.mode == "RGB"
        assert sample.image.getpixel((0, 0)) == (number, 0, 7)
        assert index.locate(number) == (paths[number // 3], sample.key)
    assert index.damage == ()


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "PNG"])
def test_image_formats(tmp_path, write_tar, picture, extension):
    content = picture(9, extension.lower())
    shard = write_tar(tmp_path / "0.tar", [(f"a.{extension}", content), ("a.txt", b"x")])
    assert build_index([shard]).read(0).image.size == (4, 4)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_images_of_any_mode_become_rgb(tmp_path, write_tar, mode):
    extension = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (3, 3)).save(tmp_path / f"a.{extension}")
    content = (tmp_path / f"a.{extension}").read_bytes()
    shard = write_tar(tmp_path / "0.tar", [(f"a.{extension}", content), ("a.txt", b"x")])
    assert build_index([shard]).read(0).image.mode == "RGB"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "key",
    ["a", "./a", "deep/er/a", "a..b/c", "d" * 60 + "/" + "k" * 70, "\u00e9\u4e2d"],
)
def test_keys_of_every_tar_format(tmp_path, write_tar, picture, format, key):
    members = [(f"{key}.png", picture(3)), (f"{key}.txt", b"x")]
    others = [("z.png", picture(4)), ("z.txt", b"y")]
    index = build_index([write_tar(tmp_path / "0.tar", [*members, *others], format)])
    assert [index.read(i).key for i in range(2)] == [key, "z"]
    again = build_index([tmp_path / "0.tar"])  # from the saved index
    assert again.read(0).key == key


def test_key_longer_than_any_header(tmp_path, write_tar, picture):
    key = "k" * 300
    members = [("first.png", picture(3)), ("first.txt", b"x"), (f"{key}.png", picture(3))]
    shard = write_tar(tmp_path / "0.tar", [*members, (f"{key}.txt", b"x")], tarfile.GNU_FORMAT)
    for _ in range(2):
        assert build_index([shard]).read(1).key == key


def test_what_is_no_sample_is_left_alone(tmp_path, write_tar, picture):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    plain = [("README", b"hello"), (".hidden.png", b"x"), ("stats.json", b"{}")]
    sample = [("a.seg.png", b"no picture"), ("a.png", picture(1)), ("a.txt", b"x")]
    write_tar(tmp_path / "1.tar", plain + sample)
    index = build_index([tmp_path / "0.tar", tmp_path / "1.tar"])
    assert len(index) == 1
    assert index.read(0).key == "a"


def test_caption_from_json(tmp_path, write_tar, picture):
    record = json.dumps({"caption": " from json ", "key": "1"}).encode()
    members = [("1.png", picture(1)), ("1.txt", b"from txt"), ("1.json", record)]
    shard = write_tar(tmp_path / "0.tar", members)
    assert build_index([shard]).read(0).caption == "from txt"
    assert build_index([shard], captions=BY_KEY).read(0).caption == "from json"


def test_classes_and_optional_captions(tmp_path, write_tar, picture):
    members = [("a.png", picture(1)), ("a.cls", b"41\n"), ("b.png", picture(2)), ("b.txt", b"")]
    index = build_index(
        [write_tar(tmp_path / "0.tar", members)], captions=CaptionRule(required=False)
    )
    assert [(index.read(i).class_index, index.read(i).caption) for i in (0, 1)] == [
        (41, ""),
        (None, ""),
    ]


def test_index_survives_pickling_and_few_open_files(tmp_path, write_tar, pairs, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    paths = [write_tar(tmp_path / f"{n}.tar", pairs([n])) for n in range(6)]
    index = pickle.loads(pickle.dumps(build_index(paths)))
    before = _open_files()
    for n in [0, 1, 2, 3, 4, 5, 0, 3]:
        assert index.read(n).caption == f"number {n}"
    assert _open_files() == before + 2
    del index
    assert _open_files() == before


def _open_files():
    return len(list(Path("/dev/fd").iterdir()))


# --- sample ids from keys


def test_ids_from_keys(tmp_path, write_tar, pairs):
    shard = write_tar(tmp_path / "0.tar", pairs([7, 3, 11]))
    index = build_index([shard], data_size=12)
    assert [index.sample_id(n) for n in range(len(index))] == [7, 3, 11]
    assert index.sample_id(2) == 11


@pytest.mark.parametrize("key", ["000012", "word", "-1", "9" * 30, "\u0663"])
def test_keys_that_are_no_ids(tmp_path, write_tar, pairs, picture, key):
    members = [*pairs([1]), (f"{key}.png", picture(2)), (f"{key}.txt", b"x")]
    shard = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError) as error:
        build_index([shard], data_size=12)
    assert all(text in str(error.value) for text in (str(shard), repr(key), "data_size 12"))


# --- damaged samples


def _cut(content):
    return content[: len(content) // 2]


DAMAGED = {
    "garbage image": ("image", lambda p: [("d.png", b"not a picture"), ("d.txt", b"x")]),
    "empty image": ("image", lambda p: [("d.png", b""), ("d.txt", b"x")]),
    "cut png": ("image_truncated", lambda p: [("d.png", _cut(p(1, "png", 64))), ("d.txt", b"x")]),
    "cut jpeg": ("image_truncated", lambda p: [("d.jpg", _cut(p(1, "jpg", 64))), ("d.txt", b"x")]),
    "no image": ("image_missing", lambda p: [("d.txt", b"x")]),
    "no caption": ("caption_missing", lambda p: [("d.png", p(1))]),
    "empty caption": ("caption_empty", lambda p: [("d.png", p(1)), ("d.txt", b" \n")]),
    "latin-1": ("caption_encoding", lambda p: [("d.png", p(1)), ("d.txt", b"caf\xe9")]),
    "class": ("class", lambda p: [("d.png", p(1)), ("d.txt", b"x"), ("d.cls", b"cat")]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_corrupt_samples_give_the_reason(tmp_path, write_tar, pairs, picture, name):
    kind, members = DAMAGED[name]
    shard = write_tar(tmp_path / "0.tar", [*pairs([0]), *members(picture), *pairs([2])])
    index = build_index([shard])
    assert [index.read(i).key for i in (0, 2)] == ["000000", "000002"]
    with pytest.raises(SampleError) as error:
        index.read(1)
    damage = error.value.damage
    assert (damage.shard, damage.key, damage.kind) == (str(shard), "d", kind)
    assert damage.detail
    assert index.damage == ()


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (b"{", "caption_json"),
        (b"[1]", "caption_missing"),
        (b'{"caption": null}', "caption_missing"),
        (b'{"caption": 3}', "caption_type"),
        (b'{"caption": ""}', "caption_empty"),
        (b'{"caption": "caf\xe9"}', "caption_encoding"),
    ],
)
def test_corrupt_json_captions(tmp_path, write_tar, picture, record, kind):
    shard = write_tar(tmp_path / "0.tar", [("d.png", picture(1)), ("d.json", record)])
    with pytest.raises(SampleError) as error:
        build_index([shard], captions=BY_KEY).read(0)
    assert error.value.damage.kind == kind


# --- damaged shards


def _garbage_inside(content):
    middle = 3 * 1024  # behind the first sample and the second's picture
    return content[:middle] + b"\xa5" * 512 + content[middle + 512 :]


@pytest.mark.parametrize(
    ("damage", "kept", "message"),
    [
        (lambda content: b"", 0, "empty"),
        (lambda content: b"<html>Not found</html>" * 100, 0, "not a tar file"),
        (lambda content: b"\x1f\x8b" + content, 0, "gzip: decompress"),
        (lambda content: content[: 4 * 1024 + 100], 2, "is truncated|not a tar header|is invalid"),
        (
            lambda content: content[: 4 * 1024 + 520],
            2,
            "is truncated at byte 4616, inside '000002.png'",
        ),
        (lambda content: content[: 4 * 1024], 2, "ends without an end mark"),
        (_garbage_inside, 1, "is invalid from byte 3072"),
    ],
)
def test_corrupt_shard_keeps_the_good_samples(tmp_path, write_tar, pairs, damage, kept, message):
    good = write_tar(tmp_path / "good.tar", pairs([10]))
    bad = write_tar(tmp_path / "bad.tar", pairs(range(4)))
    bad.write_bytes(damage(bad.read_bytes()))
    for _ in range(2):  # scanned, then from the saved index
        index = build_index([bad, good])
        assert len(index) == kept + 1
        captions = [index.read(i).caption for i in range(len(index))]
        assert captions == [f"number {n}" for n in range(kept)] + ["number 10"]
        (found,) = index.damage
        assert (found.kind, found.shard, found.key) == ("shard", str(bad), "")
        assert re.search(message, found.detail)


def test_no_shard_is_good(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no samples in 2 shard") as error:
        build_index(expand_patterns(str(tmp_path)))
    assert "is not a tar file" in str(error.value)
    assert "is empty" in str(error.value)


def test_shard_that_vanishes_before_it_is_indexed(tmp_path, write_tar, pairs):
    good = write_tar(tmp_path / "0.tar", pairs([0]))
    index = build_index([good, tmp_path / "gone.tar"])
    assert len(index) == 1
    assert "No such file" in index.damage[0].detail


@pytest.mark.parametrize("change", ["vanish", "shorten", "replace"])
def test_shard_that_changes_after_it_was_indexed(tmp_path, write_tar, pairs, change):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    index = build_index([shard])
    if change == "vanish":
        shard.unlink()
    else:
        shard.write_bytes(b"x" * (100 if change == "shorten" else 10**5))
    with pytest.raises(SampleError) as error:
        index.read(2)
    assert error.value.damage.kind == "shard_changed"
    assert "since it was indexed" in error.value.damage.detail


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_damage_never_ends_in_a_crash(tmp_path_factory, write_tar, pairs, seed):
    chance = random.Random(seed)
    shard = write_tar(tmp_path_factory.mktemp("fuzz") / "0.tar", pairs(range(5)))
    content = bytearray(shard.read_bytes())
    for _ in range(chance.randint(1, 40)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    shard.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    try:
        index = build_index([shard])
    except UserError:
        return
    for position in range(len(index)):
        try:
            assert index.read(position).image.mode == "RGB"
        except SampleError as error:
            assert str(shard) in str(error)


_NAMES = st.text("ab./", min_size=1, max_size=130).filter(lambda n: n.strip("./"))


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(_NAMES, st.binary(max_size=1500)), max_size=8),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_scan_agrees_with_tarfile(tmp_path_factory, write_tar, members, format):
    path = tmp_path_factory.mktemp("scan") / "0.tar"
    try:
        write_tar(path, members, format)
    except ValueError:
        return  # a name too long for USTAR
    with path.open("rb") as file, tarfile.open(path) as tar:
        ours = list(tar_headers.members(file, path.stat().st_size))
        theirs = tar.getmembers()
    assert [(m.path, m.block * 512, m.size) for m in ours] == [
        (m.name, m.offset_data, m.size) for m in theirs
    ]


# --- the saved index


def _no_scan(*_):
    raise AssertionError("scanned again")


def _spoil(shard):
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_second_index_comes_from_the_file(tmp_path, write_tar, pairs, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    build_index([shard])
    assert (tmp_path / ".neuclip" / "0.tar.index.npz").is_file()
    monkeypatch.setattr(tar_index, "scan", _no_scan)
    assert build_index([shard]).read(2).caption == "number 2"


def test_changed_shard_is_scanned_again(tmp_path, write_tar, pairs):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    build_index([shard])
    write_tar(shard, pairs(range(2)))
    _spoil(shard)
    assert len(build_index([shard])) == 2


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[:100], lambda b: b"x" * len(b)])
def test_corrupt_index_file_is_rebuilt(tmp_path, write_tar, pairs, spoil):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    build_index([shard])
    saved = tmp_path / ".neuclip" / "0.tar.index.npz"
    good = saved.read_bytes()
    saved.write_bytes(spoil(good))
    assert len(build_index([shard])) == 3
    assert np.load(saved)["blocks"].shape == (3, 5)


def test_folder_that_cannot_be_written(tmp_path, write_tar, pairs, own_cache, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    (tmp_path / ".neuclip").write_text("in the way, as a read-only folder would be")
    build_index([shard])
    assert len(list((own_cache / "neuclip" / "index").glob("*.npz"))) == 1
    monkeypatch.setattr(tar_index, "scan", _no_scan)
    assert len(build_index([shard])) == 3


def test_nowhere_to_save_the_index(tmp_path, write_tar, pairs, own_cache):
    shard = write_tar(tmp_path / "0.tar", pairs(range(3)))
    (tmp_path / ".neuclip").touch()
    (own_cache / "neuclip").touch()
    assert len(build_index([shard])) == 3


def test_a_damaged_index_is_made_again(tmp_path, write_tar, pairs):
    """What numpy and zipfile raise depends on the byte; arrays may have another shape, too."""
    shard = tmp_path / "0.tar"
    write_tar(shard, pairs(range(3)))
    whole = tar_index.index_shard(shard)
    saved = tmp_path / ".neuclip" / "0.tar.index.npz"
    content = saved.read_bytes()
    with np.load(saved) as stored:
        arrays = dict(stored)
    damaged = []
    for place in range(0, len(content), 17):
        for bit in (1, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            damaged.append(bytes(changed))
    rest = json.loads(arrays["rest"].tobytes())

    def changed_rest(**values):
        return np.frombuffer(json.dumps(rest | values).encode(), np.uint8)

    for name, array in [
        ("blocks", arrays["blocks"][:, :2]),
        ("sizes", arrays["sizes"].astype(np.float64)),
        ("integer_keys", arrays["integer_keys"][:0]),
        ("rest", np.array("[" * 100_000)),
        ("rest", np.array([1.5])),
        ("rest", changed_rest(findings=7)),
        ("rest", changed_rest(tally=[7])),
        ("rest", changed_rest(joined="x")),
        ("rest", changed_rest(long_endings=5)),
        ("rest", changed_rest(long_keys=[[1]])),
    ]:
        file = io.BytesIO()
        np.savez(file, **{**arrays, name: array})
        damaged.append(file.getvalue())
    for each in damaged:
        saved.write_bytes(each)
        again = tar_index.index_shard(shard)
        assert np.array_equal(again.blocks, whole.blocks)
        assert again.tally == whole.tally and again.findings == whole.findings
