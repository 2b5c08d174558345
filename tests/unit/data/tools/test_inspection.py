import base64
import io
import json
import os
import re

import pytest
import torch
from PIL import Image

from neuclip.cli.app import main
from neuclip.data.captions import CaptionRule
from neuclip.data.opening import open_source
from neuclip.data.sources.shards import build_index
from neuclip.data.tools import inspection
from neuclip.data.tools.inspection import THUMBNAIL, inspect
from neuclip.data.tools.inspection_page import facts, histogram, in_bytes, in_time, page
from neuclip.errors import UserError


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path, write_tar):
    """Three good samples of different kinds, two damaged ones, a link's worth of a key twice."""
    exif = Image.Exif()
    exif[0x0112] = 3
    members = [
        ("a.png", encode(Image.new("L", (40, 30)))),
        ("a.txt", b"four"),
        ("b.jpg", encode(Image.new("RGB", (640, 480), "red"), "jpeg", exif=exif)),
        ("b.txt", b"<b>eleven</b>"),
        ("c.png", encode(Image.new("RGBA", (20, 90)))),
        ("c.txt", b"x" * 100),
        ("d.png", b"no picture"),
        ("d.txt", b"x"),
        ("e.png", encode(Image.new("L", (9, 9)))),
        ("a.png", b"again"),
        ("a.txt", b"again"),
    ]
    return write_tar(tmp_path / "0.tar", members)


def test_counts_sizes_and_damage(shards):
    found = inspect(build_index([shards]), "mine", 100)
    assert (found.samples, found.blocks, found.read, found.good) == (5, 1, 5, 3)
    assert found.file_bytes == shards.stat().st_size
    assert found.sizes == [(40, 30), (640, 480), (20, 90)]
    assert found.caption_lengths == [4, 13, 100]
    assert found.formats == {"PNG": 2, "JPEG": 1}
    assert found.modes == {"L": 1, "RGB": 1, "RGBA": 1}
    assert found.rotated == 1
    report = found.damage.report()
    assert report["by_kind"] == {"duplicate_key": 1, "image": 1, "caption_missing": 1}
    assert {example["key"] for example in report["examples"]} == {"a", "d", "e"}
    assert found.epoch_seconds(2) == 2.5


def test_captions_longer_than_the_context(shards):
    class Tokenizer:
        """A token per letter."""

        context_length = 13

        def __call__(self, texts, context_length=13):
            rows = [[1] * len(text) + [0] * context_length for text in texts]
            return torch.tensor([row[:context_length] for row in rows])

    found = inspect(build_index([shards]), "mine", 100, tokenize=Tokenizer())
    assert (found.context, found.truncated) == (13, 1)
    assert dict(facts(found, None))["captions"].endswith(
        "; 33.3% have more than the 13 tokens that CLIP reads"
    )


def test_examples_are_thumbnails(shards, monkeypatch):
    monkeypatch.setattr(inspection, "EXAMPLES", 5)
    found = inspect(build_index([shards]), "mine", 100)
    assert [example.key for example in found.examples] == ["a", "b", "c"]
    assert found.examples[1].size == (640, 480)
    picture = Image.open(io.BytesIO(base64.b64decode(found.examples[1].jpeg)))
    assert picture.size == (THUMBNAIL, THUMBNAIL * 480 // 640)
    assert picture.getpixel((3, 3))[0] > 200


def test_reads_no_more_than_asked(tmp_path, write_tar, pairs, monkeypatch):
    monkeypatch.setattr(inspection, "EXAMPLES", 3)
    index = build_index([write_tar(tmp_path / "0.tar", pairs(range(50)))])
    found = inspect(index, "mine", 7)
    assert (found.read, found.good, len(found.examples)) == (7, 7, 3)
    again = inspect(index, "mine", 7)
    assert [e.key for e in again.examples] == [e.key for e in found.examples]


def test_limit_of_pixels(shards):
    found = inspect(build_index([shards]), "mine", 100, max_pixels=5000)
    assert found.damage.report()["by_kind"]["image_too_large"] == 1


def test_page_stands_alone_and_escapes_captions(shards):
    text = page(inspect(build_index([shards]), "mine", 100), 2.0)
    assert "&lt;b&gt;eleven" in text
    assert "<b>eleven" not in text
    assert "0.0 seconds" not in text
    assert "2.5 seconds at 2 samples/s" in text
    assert text.count("data:image/jpeg;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for kind in ("duplicate_key", "image", "caption_missing"):
        assert f"<td>{kind}</td>" in text
    assert "1 with an EXIF rotation" in text


def test_page_lists_what_is_not_read(tmp_path, write_tar, pairs):
    members = [*pairs(range(2)), ("0.<i>.flac", b""), ("1.flac", b"")]
    text = page(inspect(build_index([write_tar(tmp_path / "0.tar", members)]), "mine", 9), None)
    assert "<li>2 of 6 members, unknown ending (.&lt;i&gt;.flac, .flac)</li>" in text


def test_captions_are_counted(tmp_path, write_tar, picture):
    members = [("a.png", picture(1)), ("a.json", b'{"k": ["one", "three"]}'), ("b.png", picture(2))]
    rule = CaptionRule(("k",), required=False)
    index = build_index([write_tar(tmp_path / "0.tar", members)], captions=rule)
    rows = dict(facts(inspect(index, "mine", 9), None))
    assert rows["captions"] == "0 to 2 per sample, 3 to 5 characters, median 4"
    without = build_index([tmp_path / "0.tar"], captions=CaptionRule(required=False))
    assert dict(facts(inspect(without, "mine", 9), None))["captions"] == "none"


def test_page_of_nothing_good(tmp_path, write_tar):
    shard = write_tar(tmp_path / "0.tar", [("a.png", b"no picture"), ("a.txt", b"x")])
    text = page(inspect(build_index([shard]), "mine", 100), None)
    assert "0 of them without error" in text
    assert "How it is spread" not in text


def test_histogram_doubles():
    found = histogram("Side", "pixels", [1, 2, 3, 4, 7, 8, 0, 0])
    assert [(bar.label, bar.count) for bar in found.bars] == [
        ("0", 2),
        ("1", 1),
        ("2 to 3", 2),
        ("4 to 7", 2),
        ("8 to 15", 1),
    ]
    assert [bar.share for bar in found.bars] == [1, 0.5, 1, 1, 0.5]
    assert histogram("Side", "pixels", []) is None
    assert [bar.label for bar in histogram("Side", "bytes", [5000] * 3).bars] == ["4k to 8k"]


def test_words():
    assert (in_bytes(12), in_bytes(2_500_000), in_bytes(3e12)) == ("12 bytes", "2.5 MB", "3.0 TB")
    assert in_time(90) == "90.0 seconds"
    assert in_time(7200) == "2.0 hours"
    assert in_time(86_400 * 3.5) == "3.5 days"


def test_facts_of_a_table(tmp_path):
    Image.new("RGB", (8, 9)).save(tmp_path / "p.png")
    (tmp_path / "t.csv").write_text("filepath,title\np.png,hello\n")
    found = dict(facts(inspect(open_source(str(tmp_path / "t.csv")), "t", 5), None))
    assert found["blocks"] == "1"
    assert "size" not in found
    assert found["captions"] == "5 characters, median 5"


def test_command(shards, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    words = ["data", "inspect", str(shards), "--out", str(out), "--samples-per-second", "5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "read 5 samples, 3 of them without error" in " ".join(printed.split())
    assert "1.0 seconds at 5 samples/s" in printed
    assert f"{shards}, sample d: image: " in printed
    assert str(shards) in out.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-samples", "0"], "--max-samples: 0 is out of range"),
        (["--samples-per-second", "-1"], "--samples-per-second: -1 is out of range"),
        (["--max-image-pixels", "-1"], "--max-image-pixels: -1 is out of range"),
    ],
)
def test_command_refuses(shards, capsys, flags, message):
    assert main(["data", "inspect", str(shards), *flags]) == 2
    assert message in capsys.readouterr().err


def test_command_without_data(tmp_path, capsys):
    assert main(["data", "inspect", str(tmp_path / "none.tar")]) == 2
    assert "no shard matches" in capsys.readouterr().err


def test_json_of_the_damage_is_plain(shards):
    report = inspect(build_index([shards]), "mine", 100).damage.report()
    assert json.loads(json.dumps(report)) == report


def test_empty_source_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,title\n")
    with pytest.raises(UserError):
        inspect(open_source(str(tmp_path / "t.csv")), "t", 5)


def test_names_and_captions_that_terminals_and_pages_cannot_show(tmp_path, picture, capsys):
    (tmp_path / "set").mkdir()
    for number, caption in enumerate((b"plain", b"")):
        path = tmp_path / "set" / os.fsdecode(b"caf\xe9 \x1b%d.png" % number)
        path.write_bytes(picture(number))
        path.with_suffix(".txt").write_bytes(caption)
    out = tmp_path / "page.html"
    assert main(["data", "inspect", str(tmp_path / "set"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b1: caption_empty" in printed
    assert all(line.isprintable() for line in printed.splitlines())
    assert "caf" in out.read_text(encoding="utf-8")


def test_images_without_captions(tmp_path, picture, capsys):
    (tmp_path / "a.png").write_bytes(picture(1))
    assert main(["data", "inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "corrupt      none" in printed.out
    assert "folder of images, 1 sample; no captions" in printed.err
