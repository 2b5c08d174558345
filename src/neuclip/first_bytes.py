"""What a file is, by its first bytes: for messages about files that are not what was expected."""

from pathlib import Path

from neuclip.untrusted import open_regular

HEAD = 512
"""Number of bytes that `describe` looks at."""

ZIP = b"PK\x03\x04"
"""Start of a zip archive; `torch.save` writes one."""
_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip: unpack it with gunzip"),
    (ZIP, "a zip archive: unpack it with unzip"),
    (b"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it with 7z x"),
    (b"Rar!", "a RAR archive: unpack it with unrar x"),
    (b"PAR1", "a parquet table"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
)


def describe(head: bytes) -> str | None:
    """What a file is, and how to get at its content; None if the first bytes do not tell.

    Args:
        head: the first `HEAD` bytes of the file, or all of a shorter one.
    """
    if not head:
        return "an empty file"
    if head.startswith(_LFS):
        return "a git-lfs pointer, not the file itself: fetch the file with `git lfs pull`"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not the file itself: download the file again"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document (an error of the server it was downloaded from?)"
    if head[257:262] == b"ustar":
        return "a tar file"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    return next((words for magic, words in _MAGIC if head.startswith(magic)), None)


def first_bytes(path: Path) -> bytes:
    """The first `HEAD` bytes of a file; nothing if it cannot be read or is not a regular file."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except OSError:
        return b""
