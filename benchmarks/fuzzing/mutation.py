"""Random changes to bytes and to trees, and text that no file should hold."""

import copy
import random
from typing import Any

NUMBERS = (b"0", b"-1", b"999999999999999999999", b"1" * 5000, b"1e400", b"NaN", b"4294967296")
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**62,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    "\ud800",
    "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe",
    "a\0b",
    [],
    {},
    [[]],
    {"": {"": None}},
    "../../../etc/passwd",
    "/dev/zero",
    [1] * 3000,
    "9" * 5000,
    "é" * 300,
)
NAMES = (
    "\x1b[2J\x1b]0;title\x07",
    "a\nb",
    "a\rb",
    "\u202egnp",
    "\udcff\udce9",
    "..",
    "../up",
    "/etc/passwd",
    "é",
    "e\u0301",
    "ﬀ",
    "日本",
    "x" * 255,
    "a" * 3000,
    "<script>alert(1)</script>",
    "=cmd()",
    "%s%n",
    "{0}",
    "$HOME",
    "`id`",
    "a\0b",
    " ",
    ".",
    "-rf",
    "a\tb",
    "\u2028",
    "😀",
    "a::b",
    "{1..3}",
    "[red]x[/red]",
    "\\",
    "'\"",
    "CON",
    "\x9b31m",
    "pipe:id",
    "a.b.c.d",
    "K" * 99 + "/" + "k" * 99,
)
"""Names and keys with terminal escapes, other encodings, paths, and other programs' syntax."""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content after one to four random changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((1, 4, 40, 600)))
        change = rng.randrange(7)
        if change == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place:end] = rng.randbytes(end - place)
        elif change == 2:
            del data[place:end]
        elif change == 3:
            data[place:place] = data[place:end] * rng.choice((1, 2, 50))
        elif change == 4:
            data[place:end] = rng.choice((b"\0", b"\xff")) * (end - place)
        elif change == 5:
            data[place:place] = rng.choice(NUMBERS)
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def flipped(content: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """The content with some bits of a part flipped; its length stays."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(start, len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def changed_tree(tree: Any, rng: random.Random, changes: int | None = None) -> Any:
    """A tree of plain values with one to three of its values or keys replaced, or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(changes or rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice(_VALUES)
        holder, key = rng.choice(places)
        change = rng.random()
        if change < 0.15:
            del holder[key]
        elif change < 0.25 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif change < 0.35:
            holder[key] = deep(rng.choice((40, 99, 101, 400)))
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return tree


def _places(tree: Any) -> Any:
    """Every (holder, key) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE_JSON = (
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"9" * 100_000,
    b"1e999999",
    b"-" * 4000,
    b'"\\ud800"',
    b"\xff\xfe[\0]\0",
    b"\xef\xbb\xbf{}",
    b"",
    b"null",
    b"[NaN, Infinity]",
    b'{"a": 1, "a": 2}',
    b"\x00" * 5000,
    b'"' + b"\\u0000" * 1000 + b'"',
    b"[" + b"0," * 200_000 + b"0]",
    b"\x80\x04.",
)
