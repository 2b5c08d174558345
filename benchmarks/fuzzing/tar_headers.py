"""Tar archives whose headers are well-formed and hostile: sizes, kinds, pax records, long names."""

import random
from collections.abc import Callable

from fuzzing import valid
from fuzzing.mutation import NAMES

_BLOCK = 512
_KINDS = b"0\x001234567xgLKSDMNVAX\xff "
_SIZES = (0, 1, 511, 512, 513, 10**6, 2**31, 2**33, 2**62, 2**63, 2**70)
_PAX_KEYS = (
    "size", "path", "linkpath", "mtime", "uid", "GNU.sparse.map", "GNU.sparse.size",
    "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize",
    "GNU.sparse.numblocks", "hdrcharset", "charset", "SCHILY.xattr.user.x", "",
)  # fmt: skip
_PAX_VALUES = (
    b"0", b"1", b"-1", b"9" * 20, b"9" * 5000, b"1e9", b"0x10", b"nan", b"1.0", b"1,2,3", b"\xff",
    b"BINARY", b"x" * 70_000, b"", b"a\nb", b"\0", b"99999999999,99999999999", b"00001.png",
)  # fmt: skip


def archive(rng: random.Random) -> bytes:
    """An archive of members with random headers, some of which have valid contents."""
    parts: list[bytes] = []
    for number in range(rng.randint(1, 8)):
        parts.append(rng.choice(_MEMBERS)(rng, number))
    if rng.random() < 0.6:
        parts.append(b"\0" * _BLOCK * rng.choice((1, 2, 20)))
    if rng.random() < 0.5:
        parts.insert(rng.randrange(len(parts)), valid.shard()[: -2 * _BLOCK])
    return b"".join(parts)


def fixed_sums(content: bytes) -> bytes:
    """A tar file whose headers have correct sums, so that damage passes the first check."""
    data = bytearray(content)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def _plain(rng: random.Random, number: int) -> bytes:
    content = rng.choice((valid.picture("png", 6), b"a caption", b"5", b"9" * 5000, b'{"a": [1]}'))
    name = f"{number // 2:05d}.{rng.choice(('png', 'jpg', 'txt', 'json', 'cls', 'npy'))}"
    size = rng.choice((len(content), len(content), *_SIZES))
    return _header(name.encode(), size, rng.choice(_KINDS), rng) + _padded(content)


def _named(rng: random.Random, number: int) -> bytes:
    name = rng.choice(NAMES).encode("utf-8", "surrogatepass") + b".txt"
    if rng.random() < 0.3:
        name = bytes([rng.randrange(256)]) + name
    return _header(name, 1, ord("0"), rng) + _padded(b"x")


def _pax(rng: random.Random, number: int) -> bytes:
    records = b"".join(_record(rng) for _ in range(rng.choice((1, 2, 40))))
    kind = ord(rng.choice("xxg"))
    return _header(b"pax", len(records), kind, rng) + _padded(records)


def _record(rng: random.Random) -> bytes:
    line = b" " + rng.choice(_PAX_KEYS).encode() + b"=" + rng.choice(_PAX_VALUES) + b"\n"
    length = len(line) + len(str(len(line) + 2))
    shown = rng.choice((length, length, length, 0, -5, 10**9, 3))
    text = b"9" * 5000 if rng.random() < 0.05 else str(shown).encode()
    return text + line


def _long(rng: random.Random, number: int) -> bytes:
    name = rng.choice(NAMES).encode("utf-8", "surrogatepass") * rng.choice((1, 1, 50, 3000))
    size = rng.choice((len(name), len(name), *_SIZES))
    return _header(b"././@LongLink", size, ord(rng.choice("LK")), rng) + _padded(name)


def _sparse(rng: random.Random, number: int) -> bytes:
    header = bytearray(_header(b"00001.png", rng.choice(_SIZES), ord("S"), rng))
    for place in range(386, 386 + 4 * 24, 24):
        header[place : place + 12] = rng.choice(
            (b"%011o\0" % (8 * number), b"7" * 12, b"\xff" * 12)
        )
    header[482] = rng.choice((0, 1))
    header[483:495] = rng.choice((b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11))
    return fixed_sums(bytes(header)) + _padded(b"x" * 100)


_MEMBERS: tuple[Callable[[random.Random, int], bytes], ...] = (
    _plain, _plain, _plain, _named, _pax, _pax, _long, _sparse,
)  # fmt: skip


def _header(name: bytes, size: int, kind: int, rng: random.Random) -> bytes:
    head = bytearray(_BLOCK)
    head[:100] = name[:100].ljust(100, b"\0")
    head[100:124] = b"0000644\0" * 3
    head[124:136] = _number(size, rng)
    head[136:148] = rng.choice((b"00000000000\0", b"99999999999\0", b"\x80" + b"\xff" * 11))
    head[156] = kind
    if kind in b"12":
        head[157:257] = rng.choice((b"00000.png", b"../../x", b"/etc/passwd")).ljust(100, b"\0")
    head[257:265] = rng.choice((b"ustar\x0000", b"ustar  \0"))
    return fixed_sums(bytes(head))


def _number(size: int, rng: random.Random) -> bytes:
    """A size in 12 bytes: octal, base 256, negative, or no number."""
    form = rng.randrange(10)
    if form == 0:
        return rng.choice((b"zzzzzzzzzzz\0", b"-0000000001\0", b" " * 12, b"\xff" * 12))
    if form == 1:
        return b"\xff" + (-size % 2**88).to_bytes(11, "big")
    if form == 2 or size >= 8**11:
        return b"\x80" + (size % 2**88).to_bytes(11, "big")
    return b"%011o\0" % size


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % _BLOCK)
