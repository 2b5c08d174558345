"""The interface of all data sources: samples by position, wherever they are stored."""

import codecs
import contextlib
import errno
import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuclip.data.decode import decode_image
from neuclip.data.order import Layout
from neuclip.data.samples import Damage, Sample, SampleError, Unusable
from neuclip.untrusted import MAX_IMAGE_FILE, read_file

ROWS_PER_BLOCK = 1000  # for sources without blocks of their own

ImageT = TypeVar("ImageT")
Offsets = NDArray[np.int64]

_CHECKED_AT_A_TIME = 2**22  # bytes

Captions = Literal["required", "if_any", "optional"]
"""What a missing caption is.

- `required`: damage, and a source without captions is refused;
- `if_any`: damage if the source has captions at all;
- `optional`: an empty caption.
"""


def captions_required(captions: Captions, *, has_captions: bool) -> bool:
    """Whether a sample without a caption is corrupt, in a source with or without captions."""
    return captions == "required" or (captions == "if_any" and has_captions)


class Source(ABC):
    """Samples by position. A source can be forked and pickled: each process opens its own files.

    Subclasses implement `_content` and `locate`.

    Attributes:
        layout: the blocks that samples are stored in, and their sizes.
        damage: corrupt shards and samples found on opening; others are found on reading.
        shuffle_window: default number of blocks to shuffle together; 0: all.
        opened: what was recognised and why, in one line.
        unused: what the source holds but does not read, in one line per reason.
        has_captions: whether the source has captions; otherwise every caption is empty.
        selection: digest of the samples that are read of the files, if that is a part.
    """

    layout: Layout
    damage: tuple[Damage, ...] = ()
    shuffle_window: int = 0
    opened: str = ""
    unused: tuple[str, ...] = ()
    has_captions: bool = True
    selection: bytes = b""

    def __len__(self) -> int:
        return self.layout.samples

    @abstractmethod
    def _content(self, position: int) -> Sample[bytes]:
        """Reads one sample as it is stored; raises `Unusable` or `SampleError` if it is corrupt."""

    @abstractmethod
    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample is stored (shard, table or folder) and its key, for messages."""

    def content(self, position: int) -> Sample[bytes]:
        """Reads one sample as it is stored.

        Raises:
            SampleError: the sample is corrupt.
        """
        return self.read_with(position, bytes)

    def read(self, position: int) -> Sample[Image.Image]:
        """Reads and decodes one sample at full scale.

        Raises:
            SampleError: the sample is corrupt.
        """
        return self.read_with(position, decode_image)

    def texts(self, position: int) -> Sample[None]:
        """Reads what one sample holds besides its image; fast where texts are stored apart.

        Raises:
            SampleError: the sample is corrupt.
        """
        try:
            return self._texts(position)
        except Unusable as error:
            raise self._sample_error(position, error) from error.__cause__

    def _texts(self, position: int) -> Sample[None]:
        """As `texts`; raises `Unusable` or `SampleError`. By default the image is read, too."""
        return self._content(position).with_image(None)

    def read_with(self, position: int, decode: Callable[[bytes], ImageT]) -> Sample[ImageT]:
        """Reads one sample and decodes its image.

        Args:
            position: position of the sample.
            decode: decodes the content of an image file; may raise `Unusable`.

        Raises:
            SampleError: the sample is corrupt.
        """
        try:
            sample = self._content(position)
            return sample.with_image(decode(sample.image))
        except Unusable as error:
            raise self._sample_error(position, error) from error.__cause__

    def _sample_error(self, position: int, error: Unusable) -> SampleError:
        where, key = self.locate(position)
        return SampleError(Damage(str(where), key, error.kind, error.detail))

    def first_captions(self, samples: int = 20) -> list[tuple[str, ...]]:
        """The captions of the first samples that can be read, to describe the source.

        Args:
            samples: number of samples to try.
        """
        found: list[tuple[str, ...]] = []
        for position in range(min(samples, len(self))):
            with contextlib.suppress(SampleError, Unusable):
                found.append(self._texts(position).captions)
        return found

    def files(self) -> Iterable[str | Path]:
        """Files (or addresses) that hold the samples, without duplicates, in order."""
        return dict.fromkeys(self.locate(position)[0] for position in range(len(self)))

    def file_of(self, position: int) -> str | Path:
        """The file (or address) that holds the image of a sample."""
        return self.locate(position)[0]

    def sample_id(self, position: int) -> int:
        """Stable id of one sample: its position, unless the source has other ids."""
        return position

    def expect(self, blocks: Sequence[int]) -> None:  # noqa: B027  most sources fetch nothing
        """Announces the blocks that will be read next, in order, so that they can be prefetched."""

    def close(self) -> None:  # noqa: B027  most sources have no background work
        """Stops background work."""


def content_digest(source: Source) -> str:
    """Digest of a source's layout and of the name, size and time of each of its files.

    Images are not read. For remote files only the address counts.
    """
    digest = hashlib.sha256(source.layout.digest(0, None).encode() + source.selection)
    for file in source.files():
        digest.update(f"{file}\n".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError, ValueError):  # an address, or no such file
            status = Path(file).stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def even_blocks(samples: int) -> list[int]:
    """Block sizes for a source without blocks of its own."""
    full, rest = divmod(samples, ROWS_PER_BLOCK)
    return [ROWS_PER_BLOCK] * full + ([rest] if rest else [])


def read_image_file(folder: Path, name: str) -> bytes:
    """The content of an image file.

    Args:
        folder: folder that the name is relative to.
        name: path of the file.

    Raises:
        Unusable: the name is empty, or the file cannot be read, is not a regular file, or is larger
            than `MAX_IMAGE_FILE`.
    """
    if not name.strip():
        raise Unusable("image_missing", "the image path is empty")
    try:
        return read_file(folder / name, MAX_IMAGE_FILE)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        too_large = getattr(error, "errno", None) == errno.EFBIG
        kind = "image_too_large" if too_large else "image_missing"
        raise Unusable(kind, f"{folder / name}: {reason}") from error


class Strings(ABC):
    """Strings by index, in buffers.

    Python keeps a reference count inside each object: reading a list of millions of strings in a
    forked process would copy it page by page.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """One string in UTF-8; invalid bytes are kept."""

    def __getitem__(self, index: int) -> str:
        return self.encoded(index).decode("utf-8", "surrogateescape")

    def count_invalid(self) -> int:
        """Number of strings that are not UTF-8."""
        return sum(not _is_utf8(self.encoded(index)) for index in range(len(self)))


class Texts(Strings):
    """Strings in two buffers, which grow."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._content, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Adds one string; bytes that `surrogateescape` stands for are kept."""
        self._content += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, index: int) -> bytes:
        """One string in UTF-8; invalid bytes are kept."""
        return bytes(self._content[self._ends[index] : self._ends[index + 1]])


class Slices(Strings):
    """Strings as slices of one buffer, which need not follow each other."""

    def __init__(
        self,
        content: bytes | bytearray,
        starts: Offsets,
        ends: Offsets,
        *,
        doubled_quotes: bool = False,
    ) -> None:
        """Keeps the buffer; nothing is copied.

        Args:
            content: UTF-8; invalid bytes are kept.
            starts: [strings] first byte of each string.
            ends: [strings] end of each string.
            doubled_quotes: a quote in a string is written twice.
        """
        self._content, self._starts, self._ends = content, starts, ends
        self._doubled_quotes = doubled_quotes

    def __len__(self) -> int:
        return len(self._starts)

    def encoded(self, index: int) -> bytes:
        """One string in UTF-8; invalid bytes are kept."""
        part = bytes(self._content[self._starts[index] : self._ends[index]])
        return part.replace(b'""', b'"') if self._doubled_quotes else part

    def count_invalid(self) -> int:
        """Number of strings that are not UTF-8; fast if the whole buffer is."""
        return 0 if _is_utf8(self._content) else super().count_invalid()


class TextLists:
    """Lists of strings."""

    def __init__(self, texts: Strings, ends: Offsets) -> None:
        """Cuts strings into lists.

        Args:
            texts: the strings of all lists.
            ends: [lists] end of each list.
        """
        self._texts, self._ends = texts, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[str]:
        start = int(self._ends[index - 1]) if index else 0
        return [self._texts[number] for number in range(start, int(self._ends[index]))]


class JsonValues:
    """Values of any JSON type, kept as texts."""

    def __init__(self) -> None:
        self._texts = Texts()

    def append(self, value: object) -> None:
        """Adds one value."""
        self._texts.append(json.dumps(value))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> object:
        return json.loads(self._texts[index])


def _is_utf8(content: bytes | bytearray) -> bool:
    """Whether bytes are UTF-8, checked in pieces: no text as long as the content is made."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), _CHECKED_AT_A_TIME):
            decoder.decode(content[start : start + _CHECKED_AT_A_TIME])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
