import fcntl
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from neuclip.cli.app import main
from neuclip.config.data_sections import ReadingConfig
from neuclip.data.opening import open_source
from neuclip.data.remote.manifest import parse_manifest
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.data.tools import pack as packing
from neuclip.data.tools.pack import Plan, pack
from neuclip.errors import UserError


@pytest.fixture
def table(tmp_path):
    """A csv table of 23 pictures, one of which is none and one of which has no caption."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["filepath,title"]
    for number in range(23):
        Image.new("RGB", (4, 4), (number, 0, 9)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'' if number == 5 else f'number {number}'}")
    (folder / "7.png").write_bytes(b"no picture")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "t.csv")


GOOD = [number for number in range(23) if number not in (5, 7)]


def packed(table, out, shard_samples=5, **more):
    source = open_source(table)
    return pack(source, Plan(table, len(source), shard_samples), out, **more)


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_packs_what_is_good_and_reports_the_rest(table, tmp_path):
    found = packed(table, tmp_path / "out")
    index = build_index(expand_patterns(str(tmp_path / "out")))
    samples = [index.read(position) for position in range(len(index))]
    assert [sample.caption for sample in samples] == [f"number {n}" for n in GOOD]
    assert [sample.image.getpixel((0, 0)) for sample in samples] == [(n, 0, 9) for n in GOOD]
    assert [int(sample.key) for sample in samples] == GOOD
    report = json.loads((tmp_path / "out" / "pack_report.json").read_text())
    assert report["damage"]["by_kind"] == {"caption_empty": 1, "image": 1}
    assert found.log.report() == report["damage"]
    assert found.reused == 0
    # Keys serve as ids.
    index = build_index(expand_patterns(str(tmp_path / "out")), data_size=23)
    assert [index.sample_id(n) for n in range(len(index))] == GOOD


def test_manifest_contains_sizes_checksums_and_counts(table, tmp_path):
    found = packed(table, tmp_path / "out")
    entries = parse_manifest((tmp_path / "out" / "manifest.json").read_bytes())
    assert list(entries) == [f"{number:05d}.tar" for number in range(5)]
    assert list(entries.values()) == found.shards
    for name, entry in entries.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size, entry.sha256)
    assert [entry.samples for entry in found.shards] == [5, 3, 5, 5, 3]


def test_number_of_processes_changes_no_byte(table, tmp_path):
    packed(table, tmp_path / "one")
    packed(table, tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_image_files_are_copied_and_odd_formats_become_png(tmp_path, write_tar):
    buffers = {}
    for kind in ("jpeg", "gif"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9), (200, 10, 10)).save(buffer, kind)
        buffers[kind] = buffer.getvalue()
    members = [("a.png", buffers["jpeg"]), ("a.txt", b"x"), ("b.jpg", buffers["gif"])]
    shard = write_tar(tmp_path / "0.tar", [*members, ("b.txt", b"y"), ("b.cls", b"3")])
    packed(str(shard), tmp_path / "out")
    index = build_index(expand_patterns(str(tmp_path / "out")))
    content = [index.content(position) for position in range(2)]
    assert content[0].image == buffers["jpeg"]
    assert Image.open(io.BytesIO(content[1].image)).format == "PNG"
    assert index.read(1).image.getpixel((0, 0)) == (200, 10, 10)
    assert [each.class_index for each in content] == [None, 3]


def test_a_second_start_makes_what_is_missing(table, tmp_path, monkeypatch):
    packed(table, tmp_path / "whole")
    out, written = tmp_path / "out", []
    original = packing._write_shard

    def two_shards_then_death(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(packing, "_write_shard", two_shards_then_death)
    with pytest.raises(KeyboardInterrupt):
        packed(table, out)
    assert not (out / "manifest.json").exists()
    (out / ".pack" / "00004.tar.123.partial").write_bytes(b"of a killed process")
    monkeypatch.setattr(packing, "_write_shard", original)
    assert packed(table, out).reused == 2
    assert files(out) == files(tmp_path / "whole")
    monkeypatch.setattr(packing, "_write_shard", lambda *_: pytest.fail("nothing is missing"))
    again = packed(table, out)
    assert (again.reused, again.log.total) == (5, 2)


def test_a_shard_that_is_not_as_recorded_is_made_again(table, tmp_path, monkeypatch):
    packed(table, tmp_path / "out")
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "00002.tar").write_bytes(b"cut")
    packed(table, tmp_path / "out")
    assert files(tmp_path / "out") == whole


def test_other_content_is_not_mixed_in(table, tmp_path):
    packed(table, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another pack .*5 per shard.*, not .*6 per shard"):
        packed(table, tmp_path / "out", shard_samples=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.tar").touch()
    with pytest.raises(UserError, match="contains tar files of other origin"):
        packed(table, tmp_path / "mine")


def test_two_processes_do_not_fill_one_folder(table, tmp_path):
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with (tmp_path / "out" / ".pack" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being filled by another process"):
            packed(table, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [".pack/00001.tar.PID.partial", ".pack/plan.json", ".pack/00000.tar.json",
     ".pack/lock", "00001.tar", "manifest.json", "pack_report.json"],
)  # fmt: skip
def test_no_planted_link_is_written_through(table, tmp_path, name):
    name = name.replace("PID", str(os.getpid()))
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    (out / ".pack").mkdir(parents=True)
    (out / name).symlink_to(victim)
    try:
        packed(table, out)
    except UserError as error:
        assert name in (".pack/lock", "00001.tar") and str(out) in str(error)
        (out / name).unlink()
        packed(table, out)
    assert victim.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_planted_folder_is_not_written_to(table, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x.partial").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".pack").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"\.pack is a link: remove it"):
        packed(table, tmp_path / "out")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["x.partial"]


def test_full_disk(table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write_shard", full)
    with pytest.raises(UserError, match=r"no space left .*; .*the same command continues"):
        packed(table, tmp_path / "out")


def test_killed_at_random_moments_and_resumed(tmp_path):
    """kill -9, with workers: what comes out in the end is what an undisturbed run makes."""
    folder = tmp_path / "source"
    folder.mkdir()
    chance = random.Random(4)
    for number in range(120):
        pixels = Image.frombytes("RGB", (64, 64), chance.randbytes(64 * 64 * 3))
        pixels.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"number {number}")
    words = ["data", "pack", str(folder), "--shard-samples", "4"]
    assert main([*words, "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    out, kills = tmp_path / "out", 0
    while not (out / "manifest.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-m", "neuclip", *words, "--out", str(out), "--workers", "2"],
            stdout=subprocess.DEVNULL,
        )
        before = len(list(out.glob("*.tar")))
        while process.poll() is None and len(list(out.glob("*.tar"))) < before + 10:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    assert main([*words, "--out", str(out), "--workers", "1"]) == 0  # waits for nobody
    assert files(out) == files(tmp_path / "whole")


def test_images_without_captions(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 9)).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path), captions="if_any")
    pack(source, Plan("x", 3, 2), tmp_path / "out")
    index = open_source(str(tmp_path / "out"), captions="if_any")
    assert [index.read(n).captions for n in range(3)] == [()] * 3
    assert not index.has_captions


def test_all_captions_are_kept(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": text} for text in (["one", "two"], "three")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert main(["data", "pack", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "1 sample has several captions: train with --caption-key captions" in printed.out
    assert "t.jsonl: JSON lines, 2 samples; images from column 'image'" in printed.err
    index = open_source(str(out), ReadingConfig(caption_key="captions"))
    assert [index.read(n).captions for n in range(2)] == [("one", "two"), ("three",)]
    assert [open_source(str(out)).read(n).captions for n in range(2)] == [("one",), ("three",)]


def test_a_shard_without_a_good_sample_is_not_written(table, tmp_path):
    (tmp_path / "source" / "6.png").write_bytes(b"no picture")
    found = packed(table, tmp_path / "out", shard_samples=1)
    assert len(found.shards) == 20
    assert len(list((tmp_path / "out").glob("*.tar"))) == 20
    assert all(entry.samples for entry in found.shards)


def test_a_source_of_which_nothing_can_be_read(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main(["data", "pack", str(tmp_path), "--out", str(out), "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert "none of 3 samples" in message
    assert "(3 image), so there is nothing to pack; the first: " in message
    assert not list(tmp_path.rglob("*.tar"))
    assert not (out / "manifest.json").exists()


def test_command(table, tmp_path, capsys):
    words = ["data", "pack", table, "--out", str(tmp_path / "out"), "--shard-samples", "10"]
    assert main([*words, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "21 samples in 3 shards" in printed
    assert "left out: 1 caption_empty, 1 image; see" in printed
    assert main(words) == 0
    assert "3 of them existed already" in capsys.readouterr().out
    assert main([*words, "--workers", "0"]) == 2
    assert "--workers: 0 is out of range" in capsys.readouterr().err
