"""Messages in the store, to which any program that reaches the port can write."""

import json

import pytest

from neuclip.parallel.heartbeat import Failure


def stored(**values):
    return json.dumps({"rank": 1, "host": "h", "reason": "r", **values}).encode()


def test_a_failure_is_read_as_it_was_written():
    found = Failure.read(stored(reason="--lr 0 is out of range\nsecond line"))
    assert found == Failure(1, "h", "--lr 0 is out of range\nsecond line")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"7", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b"9" * 5000, b"\x1b[2J",
        b'{"rank": 1}', stored(host=4), stored(reason=[1]), stored(reason=None),
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_other_content_is_quoted(text):
    found = Failure.read(text)
    assert found.rank is None
    assert found.reason.startswith("unreadable message in the store: ")
    assert str(found).isprintable() and len(str(found)) < 200


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": "4"}, "r"),
        ({"rank": True}, "r"),
        ({"rank": None}, "r"),
        ({"host": "\x1b[31mh"}, "process 1 on \\x1b[31mh failed: r"),
        ({"reason": "a\x1b[2J\rb"}, "process 1 on h failed: a\\x1b[2J\nb"),
        ({"more": 1}, "process 1 on h failed: r"),
    ],
)
def test_text_is_escaped(values, message):
    assert str(Failure.read(stored(**values))) == message


def test_text_is_shortened():
    found = Failure.read(stored(reason="\n".join(["x" * 10_000] * 10_000), host="h" * 10_000))
    assert len(str(found)) < 50_000
