"""Text from files in messages, and what a file is by its first bytes."""

import gzip
import io
import tarfile
import zipfile

import pytest
from PIL import Image

from neuclip.errors import UserError, printable, quantity
from neuclip.first_bytes import HEAD, describe, first_bytes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, café", "plain words, café"),
        ("a\tb\nc\x1b[31m", r"a\tb\nc\x1b[31m"),
        ("caf\udce9", r"caf\udce9"),
        ("x" * 80, "x" * 80),
        ("x" * 10_000_000, "x" * 77 + "..."),
        ("\x00" * 200, r"\x00" * 19 + r"\..."),
    ],
)
def test_text_of_files_is_short_and_printable(text, shown):
    assert printable(text) == shown
    assert len(shown) <= 80
    assert shown.isprintable()
    assert shown.encode()


@pytest.mark.parametrize(
    ("number", "noun", "shown"),
    [
        (0, "epoch", "0 epochs"),
        (1, "epoch", "1 epoch"),
        (1.0, "point", "1 point"),
        (0.5, "point", "0.5 points"),
        (1, "batch", "1 batch"),
        (2, "batch", "2 batches"),
        (13_000, "more class", "13,000 more classes"),
        (1_234_567, "mix", "1,234,567 mixes"),
        (1, "process", "1 process"),
    ],
)
def test_a_number_agrees_with_its_noun(number, noun, shown):
    assert quantity(number, noun) == shown


def written(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
        (gzip.compress(b"x", mtime=0), "gunzip"),
        (written(lambda file: zipfile.ZipFile(file, "w").writestr("a", "b")), "unzip"),
        (written(lambda file: Image.new("RGB", (4, 4)).save(file, "jpeg")), "a JPEG image"),
        (written(lambda file: Image.new("RGB", (4, 4)).save(file, "webp")), "a WebP image"),
        (b"", "an empty file"),
        (b"filepath,title\n", None),
    ],
)  # fmt: skip
def test_first_bytes_name_the_kind(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    found = describe(first_bytes(tmp_path / "x"))
    assert found == words if words is None else words in str(found)


def test_a_tar_file_is_recognised(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert len(first_bytes(tmp_path / "x.tar")) == HEAD
    assert describe(first_bytes(tmp_path / "x.tar")) == "a tar file"
    assert first_bytes(tmp_path / "none") == b""


def test_code_that_expects_errors_of_libraries_does_not_swallow_a_message_for_the_user():
    expected = (OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError)
    assert not issubclass(UserError, expected)
