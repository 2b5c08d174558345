"""Image files whose headers are well-formed and hostile: sizes, counts, scans, frames, chunks."""

import random
import struct
import zlib
from collections.abc import Callable

from fuzzing import valid
from fuzzing.mutation import damaged

_SIDES = (0, 1, 2, 255, 4000, 4096, 16383, 65535, 2**20, 2**31 - 1, 2**32 - 1)


def image(rng: random.Random) -> tuple[str, bytes]:
    """An ending, and the content of a hostile image file."""
    return rng.choice(_FORMS)(rng)


def _png(rng: random.Random) -> tuple[str, bytes]:
    side = rng.choice(_SIDES), rng.choice(_SIDES)
    depth, colour = rng.choice(((8, 2), (8, 0), (16, 6), (1, 0), (8, 3), (3, 9)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *side, depth, colour, 0, 0, rng.randrange(3)))]
    bomb = zlib.compress(bytes(rng.choice((100, 10**6, 3 * 10**7))))
    extra = (
        (b"zTXt", b"key\0\0" + bomb),
        (b"iCCP", b"name\0\0" + bomb),
        (b"iTXt", b"k\0\1\0\0\0" + bomb),
        (b"PLTE", b"xyz" * rng.choice((1, 256, 9000))),
        (b"tRNS", b"\0" * 300),
        (b"eXIf", b"II*\0" * 9),
        (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        (b"fcTL", struct.pack(">IIIIIHHBB", *[7] * 9)),
        (b"fdAT", b"\0\0\0\1" + bomb),
        (b"gAMA", b""),
        (b"cHRM", b"\0" * 31),
        (b"pHYs", b"\0"),
    )
    chunks += rng.sample(extra, rng.randint(0, 4))
    chunks.append((b"IDAT", bomb))
    if rng.random() < 0.7:
        chunks.append((b"IEND", b""))
    return "png", b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each, rng) for each in chunks)


def _chunk(name: bytes, content: bytes, rng: random.Random) -> bytes:
    length = rng.choice((len(content),) * 9 + (2**31 - 1,))
    return (
        struct.pack(">I", length) + name + content + struct.pack(">I", zlib.crc32(name + content))
    )


def _jpeg(rng: random.Random) -> tuple[str, bytes]:
    content = bytearray(valid.picture("jpeg", progressive=rng.random() < 0.6))
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        start = content.find(marker)
        if start > 0:
            height, width = rng.choice(_SIDES[:8]), rng.choice(_SIDES[:8])
            content[start + 5 : start + 9] = struct.pack(">HH", height, width)
            if rng.random() < 0.3:
                content[start + 11] = rng.choice((0x11, 0x44, 0x00, 0xFF))
    scan = content.rfind(b"\xff\xda")
    if rng.random() < 0.5:
        content[scan:-2] = content[scan:-2] * rng.choice((2, 300, 4000))
    if rng.random() < 0.3:
        extra = rng.choice((b"\xff\xe1\xff\xffExif\0\0MM\0*", b"\xff\xe2\xff\xffMPF\0II*\0"))
        content[2:2] = extra + rng.randbytes(200)
    return "jpg", bytes(content)


def _gif(rng: random.Random) -> tuple[str, bytes]:
    side = struct.pack("<HH", rng.choice(_SIDES[:8]), rng.choice(_SIDES[:8]))
    frame = (
        b"\x2c" + struct.pack("<HH", rng.choice((0, 9, 65535)), 0) + side + b"\0\x02\x02\x4c\x01\0"
    )
    head = b"GIF89a" + side + b"\xf0\0\0" + b"\0" * 6
    control = b"\x21\xf9\x04\x09\0\0\0\0" * rng.choice((0, 1, 5000))
    comment = (b"\x21\xfe" + b"\xff" + b"c" * 255) * rng.choice((0, 1, 900)) + b"\0"
    return "gif", head + control + comment + frame * rng.choice((1, 3000)) + b"\x3b"


def _bmp(rng: random.Random) -> tuple[str, bytes]:
    width, height = rng.choice(_SIDES[:9]), rng.choice((*_SIDES[:9], -5))
    bits, compression = rng.choice(((8, 1), (4, 2), (24, 0), (32, 3), (1, 0), (16, 3), (8, 9)))
    head = struct.pack(
        "<IiiHHIIiiII",
        rng.choice((40, 12, 108, 124, 5)),
        width,
        height,
        1,
        bits,
        compression,
        0,
        0,
        0,
        rng.choice((0, 256, 2**31)),
        0,
    )
    body = rng.choice((b"\xff\x01" * 5000, b"\0\x02\xff\xff" * 5000, b"\0\0" * 9, bytes(3000)))
    content = head + b"\0" * 1024 + body
    return "bmp", b"BM" + struct.pack("<IHHI", len(content), 0, 0, 14 + len(head) + 1024) + content


def _tiff(rng: random.Random) -> tuple[str, bytes]:
    tags = []
    for tag in sorted(
        {256, 257, 258, 259, 262, 273, 277, 278, 279, *rng.choices(range(254, 350), k=4)}
    ):
        kind, count = rng.choice(((3, 1), (4, 1), (4, 1), (2, 9), (5, 2), (16, 1), (99, 1)))
        if rng.random() < 0.1:
            count = rng.choice((0, 2**31, 2**32 - 1, 100_000))
        value = {259: rng.choice((1, 2, 5, 7, 8, 32773, 50000)), 258: 8, 262: 2, 277: 3}.get(
            tag, rng.choice(_SIDES)
        )
        tags.append(struct.pack("<HHII", tag, kind, count, value))
    following = rng.choice((0, 8, 9, 2**31))  # the next directory: none, this one, or elsewhere
    body = struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", following)
    return "tif", b"II*\0\x08\0\0\0" + body + rng.randbytes(400)


def _ppm(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"P7", b"PyCMYK"))
    numbers = [
        rng.choice((b"1", b"40", b"2000", b"65535", b"9" * 400, b"-3", b"1.5", b"#c\n"))
        for _ in range(3)
    ]
    return "ppm", kind + b"\n" + b" ".join(numbers) + b"\n" + rng.choice(
        (b"1 ", b"255 ", b"\xff")
    ) * 30_000


def _webp(rng: random.Random) -> tuple[str, bytes]:
    content = bytearray(valid.picture("webp", lossless=rng.random() < 0.5))
    wide = (rng.choice((0, 9, 4000, 16383, 2**24 - 1))).to_bytes(3, "little")
    high = (rng.choice((0, 9, 4000, 16383))).to_bytes(3, "little")
    extended = (
        b"VP8X" + struct.pack("<I", 10) + bytes([rng.randrange(64)]) + b"\0\0\0" + wide + high
    )
    animated = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = b"ANMF" + struct.pack("<I", 16 + len(content) - 12) + bytes(16) + content[12:]
    body = extended + rng.choice((b"", animated + frame * rng.choice((1, 200)))) + content[12:]
    if rng.random() < 0.5:
        body = content[12:]
        body[8 + 6 : 8 + 10] = rng.randbytes(4)  # the size of a lossy frame
    return "webp", b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + bytes(body)


def _boxes(rng: random.Random) -> tuple[str, bytes]:
    kinds = [each for each in valid.pictures() if each[0] in ("jp2", "avif")]
    if not kinds:
        return _png(rng)
    ending, content = rng.choice(kinds)
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):  # 32-bit numbers near the start: sizes of boxes and images
        place = rng.randrange(0, min(len(data) - 4, 400))
        data[place : place + 4] = struct.pack(">I", rng.choice(_SIDES))
    return ending, bytes(data)


def _as_other(rng: random.Random) -> tuple[str, bytes]:
    """Bytes that are not an image, or the end of one kind after the start of another."""
    first, second = (content for _, content in rng.choices(valid.pictures(), k=2))
    ending = rng.choice(("jpg", "png", "webp", "tif"))
    other = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4",
        b"<svg/>",
        b"",
        b"\0" * 99,
        b"GIMP Brush" * 9,
        b"SIMPLE  =                    T",
        b"\x01\0\0\0" + bytes(80),
        b"8BPS\0\1",
        first[: len(first) // 2] + second,
        first + second,
        first * 3,
    )
    return ending, rng.choice(other)


def _mutated(rng: random.Random) -> tuple[str, bytes]:
    ending, content = rng.choice(valid.pictures())
    return ending, damaged(content, rng)


_FORMS: tuple[Callable[[random.Random], tuple[str, bytes]], ...] = (
    _png,
    _jpeg,
    _gif,
    _bmp,
    _tiff,
    _ppm,
    _webp,
    _boxes,
    _as_other,
    _mutated,
)
