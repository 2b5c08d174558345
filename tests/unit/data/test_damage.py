"""Whatever breaks: each damage is classified, counted, and named with shard and key."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from neuclip.data.batch import Batch
from neuclip.data.captions import shorten
from neuclip.data.damage import DamageLog, check_index
from neuclip.data.loader import LoaderSettings, TrainLoader, evaluation_loader, evaluation_requests
from neuclip.data.samples import Damage, SampleError
from neuclip.data.sources.shards import build_index
from neuclip.errors import UserError
from neuclip.model.clip import build_clip


def transform(image):
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).reshape(3, 1, 1)


def tokenize(texts):
    return torch.tensor([[len(text)] for text in texts])


def found(index):
    """All damage of an index, by kind and key: what the scan finds, then what reading finds."""
    damage = list(index.damage)
    for position in range(len(index)):
        try:
            index.read(position)
        except SampleError as error:
            damage.append(error.damage)
    return damage


def kinds(damage):
    return sorted((each.kind, each.key) for each in damage)


# --- what is in a tar besides samples


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_links_and_devices_are_named_and_left_out(tmp_path, picture, kind, word):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "folder", kind=tarfile.DIRTYPE)  # no damage
        add(tar, "a.png", picture(1))
        add(tar, "a.txt", b"x")
        add(tar, "b.png", kind=kind, link="/etc/passwd")
        add(tar, "c.png", picture(2))
        add(tar, "c.txt", b"y")
    for _ in range(2):  # scanned, then from the saved index
        index = build_index([tmp_path / "0.tar"])
        assert [index.read(i).key for i in range(len(index))] == ["a", "c"]
        assert kinds(index.damage) == [("member_type", "b.png")]
        assert word in index.damage[0].detail


@pytest.mark.parametrize("name", ["/etc/a", "../a", "x/../../a", "x/.."])
def test_paths_that_lead_out_are_named_and_left_out(tmp_path, write_tar, pairs, picture, name):
    members = [*pairs([0]), (f"{name}.png", picture(2)), (f"{name}/y.txt", b"x"), *pairs([1])]
    index = build_index([write_tar(tmp_path / "0.tar", members)])
    assert [index.read(i).key for i in range(len(index))] == ["000000", "000001"]
    expected = [f"{name}/y.txt"] if name == "x/.." else [f"{name}.png", f"{name}/y.txt"]
    assert kinds(index.damage) == [("member_name", path) for path in sorted(expected)]


def test_a_repeated_key_is_reported_once_and_the_first_is_kept(tmp_path, write_tar, pairs, picture):
    def sample(key, number):
        return [(f"{key}.png", picture(number)), (f"{key}.txt", str(number).encode())]

    side_by_side = [*sample("a", 1), *sample("a", 2)]
    members = [*side_by_side, *sample("b", 3), ("a.txt", b"4"), ("b.json", b"{}"), *sample("c", 5)]
    index = build_index([write_tar(tmp_path / "0.tar", members)])
    assert [index.read(i).caption for i in range(len(index))] == ["1", "3", "5"]
    assert kinds(index.damage) == [("duplicate_key", "a"), ("duplicate_key", "a")]


def test_the_same_key_in_two_shards_is_no_damage(tmp_path, write_tar, pairs):
    shards = [write_tar(tmp_path / f"{n}.tar", pairs([7])) for n in range(2)]
    index = build_index(shards)
    assert (len(index), index.damage) == (2, ())


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (lambda content: content, "after the end mark at byte"),
        (lambda content: b"\0" * 5000 + b"x", "after the end mark"),
        (lambda content: b"\0" * 3 * 2**20, "is all zeros from byte"),
        (lambda content: b"\0" * 2**19, None),  # padding
    ],
)
def test_what_follows_the_end_mark(tmp_path, write_tar, pairs, behind, message):
    shard = write_tar(tmp_path / "0.tar", pairs(range(2)))
    content = shard.read_bytes()
    shard.write_bytes(content + behind(content))
    index = build_index([shard])
    assert len(index) == 2
    if message is None:
        assert index.damage == ()
    else:
        assert message in index.damage[0].detail


# --- captions


def test_long_caption_is_bounded_before_it_is_tokenized(tmp_path, write_tar, picture):
    long = "word " * 200_000
    shard = write_tar(tmp_path / "0.tar", [("a.png", picture(1)), ("a.txt", long.encode())])
    caption = build_index([shard]).read(0).caption
    assert len(caption) <= 4096
    assert long.startswith(caption)


@pytest.mark.parametrize(
    "text",
    [
        "photography black and white " * 40_000,
        " \n ".join(["one"] + [" " * 9000] + ["two"] * 2000),
        "blackandwhitephotography " * 1000,
        "\u4e2d\u6587" * 10_000,
        "a photo of a cat",
    ],
)
def test_bounded_caption_has_the_same_tokens(text):
    tokenize = build_clip("glyph-tiny", "fp32", torch.device("cpu")).tokenize
    assert torch.equal(tokenize([shorten(text)]), tokenize([text]))


def test_bounded_caption_leaves_others_alone():
    text = "two  spaces,\na line" * 200
    assert len(text) < 4096
    assert shorten(f"  {text}\n") == text


# --- limits


def damage_of(kind, shard="0.tar", key="a"):
    return Damage(shard, key, kind, "detail")


def test_the_limit_on_indexing_counts_all_data_not_the_first_step():
    lost = [damage_of("shard", f"{n}.tar", "") for n in range(9)]
    log = DamageLog()
    log.add(lost)
    log.check(0.01, seen=64)
    check_index(lost, 0.01, samples=10**6, shards=1000)
    with pytest.raises(UserError, match="9 of 100 shards are corrupt") as error:
        check_index(lost, 0.01, samples=10**6, shards=100)
    assert "0.tar (1)" in str(error.value)
    assert "--max-bad-fraction 0.01" in str(error.value)


def test_members_left_out_count_against_the_samples():
    lost = [damage_of("duplicate_key", "bad.tar", str(n)) for n in range(40)]
    check_index(lost, 0.01, samples=3000, shards=3)
    with pytest.raises(UserError, match=r"40 members .* of 500 samples.*bad\.tar \(40\)"):
        check_index(lost, 0.01, samples=500, shards=3)


def test_a_limit_of_zero_stops_at_the_first():
    check_index([], 0, samples=5, shards=1)
    with pytest.raises(UserError, match="--max-bad-fraction 0 allows"):
        check_index([damage_of("member_type")], 0, samples=10**6, shards=10)


def test_log_lists_thousands_and_names_a_hundred():
    log = DamageLog()
    named = log.add(damage_of("image", key=str(number % 300)) for number in range(600))
    report = log.report()
    assert len(named) == 100
    assert report["total"] == 600
    assert [example["key"] for example in report["examples"]] == [str(n) for n in range(300)]
    again = DamageLog.from_report(json.loads(json.dumps(report)))
    assert again.add([damage_of("image", key="5")]) == []
    assert again.report()["total"] == 601
    assert len(again.report()["examples"]) == 300


# --- a shard that vanishes while it is read


def test_shard_that_vanishes_in_mid_epoch_is_counted_and_replaced(tmp_path, write_tar, pairs):
    shards = [write_tar(tmp_path / f"{n}.tar", pairs(range(8 * n, 8 * n + 8))) for n in range(4)]
    index = build_index(shards)
    loader = TrainLoader(index, transform, tokenize, LoaderSettings(4, seed=1))
    shards[2].unlink()
    batches = list(loader)
    damage = [found for batch in batches for found in batch.damage]
    assert [len(batch) for batch in batches] == [4] * 8
    assert {(found.shard, found.kind) for found in damage} == {(str(shards[2]), "shard_changed")}
    assert len(damage) >= 8
    assert all(int(key) // 8 != 2 for batch in batches for key in batch.keys)


# --- fuzz: 500 randomly damaged shards

SAMPLES = 6


def _png(number, width=4, height=4):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 7)).save(buffer, "png")
    return buffer.getvalue()


def _jpeg(number):
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg")
    return buffer.getvalue()


def _bomb():
    content = bytearray(_png(1))
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


# What can be done to one sample (its members by extension) and which kind that is.
SAMPLE_DAMAGE = {
    "image": lambda chance, parts: {**parts, "jpg": b"<html>" + chance.randbytes(40)},
    "image_truncated": lambda chance, parts: {
        **parts, "jpg": parts["jpg"][: chance.randrange(9, len(parts["jpg"]) - 9)]
    },
    "image_too_large": lambda chance, parts: {**parts, "jpg": _bomb()},
    "image_missing": lambda chance, parts: {"txt": parts["txt"]},
    "caption_missing": lambda chance, parts: {"jpg": parts["jpg"]},
    "caption_empty": lambda chance, parts: {**parts, "txt": chance.choice([b"", b" \n\t"])},
    "caption_encoding": lambda chance, parts: {**parts, "txt": b"caf\xe9 " + chance.randbytes(3)},
}  # fmt: skip


def _member(name, content=b"", kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
    return member.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


def _pieces(chance, number):
    """The parts of a shard in order: bytes, and the damage in them as (kind, key), if any."""
    for place in range(SAMPLES):
        key = f"{number:04d}{place:02d}"
        parts, kind = {"jpg": _jpeg(number * SAMPLES + place), "txt": key.encode()}, None
        if chance.random() < 0.3:
            kind = chance.choice(list(SAMPLE_DAMAGE))
            parts = SAMPLE_DAMAGE[kind](chance, parts)
        sample = b"".join(_member(f"{key}.{name}", content) for name, content in parts.items())
        yield sample, kind and (kind, key)
        event = chance.random()
        if event < 0.05:
            yield sample, ("duplicate_key", key)
        elif event < 0.10:
            name, kinds = f"link{key}.jpg", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]
            yield _member(name, kind=chance.choice(kinds)), ("member_type", name)
        elif event < 0.15:
            path = chance.choice(["/tmp/", "../", "a/../../"]) + key + ".jpg"
            yield _member(path, b"x" * 700), ("member_name", path)


def _damaged_shard(chance, number):
    """The bytes of a shard, and the damage done to it as a multiset of (kind, key)."""
    pieces, event = list(_pieces(chance, number)), chance.random()
    whole = ("shard", "")
    if event < 0.05:
        return b"", Counter([whole])
    if event < 0.10:
        return chance.randbytes(4096), Counter([whole])
    end = b"\0" * 1024
    if event < 0.40:  # cut or overwritten behind some piece: the rest is lost with the shard
        kept = chance.randrange(1, len(pieces) + 1)
        rest = b"".join(content for content, _ in pieces[kept:]) + end
        end = b"" if event < 0.25 else b"\xa5" * 512 + rest[512:]
        pieces = pieces[:kept]
    done = Counter(damage for _, damage in pieces if damage)
    if event < 0.40:
        done[whole] += 1
        samples = [damage for _, damage in pieces if not damage or damage[0] in SAMPLE_DAMAGE]
        if samples[-1] and samples[-1][0] in ("image_missing", "caption_missing"):
            done -= Counter([samples[-1]])  # its other half may be what is lost
    return b"".join(content for content, _ in pieces) + end, done


def test_500_randomly_corrupted_shards_are_counted_exactly(tmp_path):
    chance = random.Random(2026)
    shards, expected, by_shard = [], Counter(), {}
    for number in range(500):
        content, done = _damaged_shard(chance, number)
        shard = tmp_path / f"{number:04d}.tar"
        shard.write_bytes(content)
        shards.append(shard)
        by_shard[str(shard)] = done
        expected.update(kind for kind, _ in done.elements())
    index = build_index(shards)
    log = DamageLog()
    log.add(index.damage)
    good = 0
    requests = evaluation_requests(np.arange(len(index)), 64)
    for batch in evaluation_loader(index, transform, tokenize, requests, LoaderSettings(4)):
        good += len(batch) if isinstance(batch, Batch) else 0
        log.add(batch.damage)
    report = log.report()
    assert report["by_kind"] == dict(expected)
    assert set(expected) == {*SAMPLE_DAMAGE, "duplicate_key", "member_type", "member_name", "shard"}
    listed = {shard: Counter() for shard in by_shard}
    for example in report["examples"]:
        listed[example["shard"]][example["kind"], example["key"]] += 1
    assert listed == by_shard
    assert good == len(index) - sum(expected[kind] for kind in SAMPLE_DAMAGE)
    assert not list(tmp_path.glob("*.jpg"))


def test_training_on_corrupt_shards_fills_all_batches(tmp_path):
    chance = random.Random(7)
    shards, lost = [], 0
    for number in range(60):
        content, done = _damaged_shard(chance, number)
        shards.append(tmp_path / f"{number:04d}.tar")
        shards[-1].write_bytes(content)
        lost += sum(count for (kind, _), count in done.items() if kind in SAMPLE_DAMAGE)
    index = build_index(shards)
    loader = TrainLoader(index, transform, tokenize, LoaderSettings(1, seed=3))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [1] * len(index)
    # A damaged sample is met in its own place, and perhaps again as a substitute.
    assert sum(bool(batch.damage) for batch in batches) == lost
    log = DamageLog()
    for batch in batches:
        log.add(batch.damage)
    with pytest.raises(UserError, match="Worst: "):
        log.check(0.01, len(batches))
    log.check(0.5, len(batches))
