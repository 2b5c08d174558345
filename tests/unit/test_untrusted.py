"""Numbers, JSON and files from elsewhere: bounded, and refused in an ordinary error."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from neuclip.untrusted import parse_json, read_file, read_json, whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("007", 7), (b"42", 42), ("9" * 18, 10**18 - 1)]
    + [(text, None) for text in ("", "-1", "+1", " 1", "1_0", "1.0", "1e3", "9" * 19, "1" * 5000)]
    + [(text, None) for text in ("²", "٣", "\u0967", b"", b"1\0", b"\xb2", "1\n")],
)
def test_a_whole_number_is_of_few_ascii_digits(text, number):
    assert whole_number(text) == number
    assert whole_number("1234", digits=3) is None


@pytest.mark.parametrize("pair", ["[]", "{}"])
@pytest.mark.parametrize("depth", [101, 900, 5_000, 200_000])
def test_deep_json_is_a_value_error(pair, depth):
    opening = "[" if pair == "[]" else '{"a":'
    text = opening * depth + "1" + pair[1] * depth
    with pytest.raises(ValueError, match="100 deep"):
        parse_json(text)
    with pytest.raises(ValueError, match="100 deep"):
        parse_json(f'{{"caption": "a cat", "more": {text}}}'.encode())


def test_wide_json_and_brackets_in_texts_are_not_deep():
    assert len(parse_json("[" + ",".join(["[1, {}]"] * 500) + "]")) == 500
    assert parse_json('{"caption": "' + "[" * 500 + '"}') == {"caption": "[" * 500}
    assert parse_json("[" * 100 + "]" * 100)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", float(2**63)),
        ("1" + "0" * 30, 1e30),
        ("1" * 6000, float("inf")),
        ("-" + "1" * 400, -float("inf")),
    ],
)
def test_integers_of_json_fit_into_64_bits_or_are_floats(text, value):
    (found,) = parse_json(f"[{text}]".encode())
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe\x00", "[1,]", '{"a" 1}', "nul"])
def test_what_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_has_a_largest_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('["' + "a" * 100 + '"]')
    assert read_json(path) == ["a" * 100]
    with pytest.raises(ValueError, match="104 bytes of JSON are more than 50"):
        parse_json(path.read_bytes(), 50)
    with pytest.raises(OSError, match="104 bytes are more than 50"):
        read_json(path, 50)


def named_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def bound_socket(path: Path) -> Path:
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))
    server.close()
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def link_to_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize(
    "make",
    [
        named_pipe,
        bound_socket,
        folder,
        link_to_device,
        lambda _: Path("/dev/zero"),
        lambda path: path,
    ],
    ids=["pipe", "socket", "folder", "link", "device", "absent"],
)
def test_only_regular_files_are_read_and_nothing_waits(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, start = make(tmp_path / "x"), time.monotonic()
    with pytest.raises(OSError):
        read_file(path, 100)
    assert time.monotonic() - start < 1


def test_a_file_is_read_whole_or_refused_by_its_size(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == read_file(path) == b"12345"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(OSError) as caught:
        read_file(path, 2**20)
    assert caught.value.errno == errno.EFBIG


def test_an_empty_file_and_one_that_lies_about_its_size(tmp_path):
    (tmp_path / "a").touch()
    assert read_file(tmp_path / "a") == b""
    assert read_file(Path("/proc/self/status"), 100) == b""
