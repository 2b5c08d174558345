"""What a loader reads from: samples by position, wherever they lie."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip.data.decode import Decode, decode_image
from neuclip.data.order import Layout
from neuclip.data.samples import (
    Damage,
    DamageKind,
    RawSample,
    SampleError,
    Unusable,
    bounded_caption,
)

ROWS_PER_BLOCK = 1000  # where a source has no blocks of its own


@dataclass(frozen=True)
class Content:
    """A sample before its image is decoded.

    Attributes:
        key: its name in its source.
        image: the image file.
        caption: as it will be tokenized.
        class_index: that of an evaluation split, if it has one.
        metadata: that of an evaluation split, if it has some.
    """

    key: str
    image: bytes
    caption: str
    class_index: int | None = None
    metadata: bytes | None = None


class Source(ABC):
    """Samples by position. It may be forked and pickled; each process opens the files it reads.

    Attributes:
        layout: which samples lie together, and how many there are.
        damage: what is known to be missing already; what is wrong with a sample shows on reading.
        shuffle_window: blocks shuffled together unless the user says otherwise; 0: all.
    """

    layout: Layout
    damage: tuple[Damage, ...] = ()
    shuffle_window: int = 0

    def __len__(self) -> int:
        return self.layout.samples

    @abstractmethod
    def content(self, position: int) -> Content:
        """One sample as it is stored.

        Raises:
            SampleError: the sample cannot be used.
        """

    @abstractmethod
    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample lies (shard, table or folder) and its key, for messages."""

    def read(self, position: int, decode: Decode = decode_image) -> RawSample:
        """Read and decode one sample.

        Args:
            position: of the sample.
            decode: makes the picture of the image file.

        Raises:
            SampleError: the sample cannot be used.
        """
        content = self.content(position)
        try:
            image = decode(content.image)
        except Unusable as error:
            where = str(self.locate(position)[0])
            raise sample_error(where, content.key, error) from error.__cause__
        return RawSample(content.key, image, content.caption, content.class_index, content.metadata)

    def files(self) -> Iterable[str | Path]:
        """Files (or addresses) that hold the samples, once each, in order."""
        return dict.fromkeys(self.locate(position)[0] for position in range(len(self)))

    def sample_id(self, position: int) -> int:
        """Stable id of one sample: its position, unless the source has better ones."""
        return position

    def expect(self, blocks: Sequence[int]) -> None:  # noqa: B027  most have nothing to fetch
        """Told which blocks will be read next, in order; to be fetched ahead where that helps."""

    def close(self) -> None:  # noqa: B027  most have nothing in the background
        """Stop what works in the background."""


def content_digest(source: Source) -> str:
    """Changes when a source has other samples, or a file of it another name, size or time.

    The pictures are not read. Of what lies on other machines only the address is looked at.
    """
    digest = hashlib.sha256(source.layout.digest(0, None).encode())
    for file in source.files():
        digest.update(f"{file}\n".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError, ValueError):  # an address, or no file
            status = Path(file).stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def sample_error(where: str, key: str, error: Unusable) -> SampleError:
    """What is wrong with a part of a sample, with the sample's name."""
    return SampleError(Damage(where, key, error.kind, error.detail))


def damaged(where: str | Path, key: str, kind: DamageKind, detail: str) -> SampleError:
    """What is wrong with a sample."""
    return SampleError(Damage(str(where), key, kind, detail))


def clean_caption(text: str) -> str:
    """A caption without the spaces around it.

    Raises:
        Unusable: nothing is left, or it was not UTF-8 (read with `surrogateescape`).
    """
    text = bounded_caption(text)
    if not text:
        raise Unusable("caption_empty", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("caption_encoding", "not UTF-8") from None
    return text


def even_blocks(samples: int) -> list[int]:
    """Sizes of the blocks of a source that has none of its own."""
    whole, rest = divmod(samples, ROWS_PER_BLOCK)
    return [ROWS_PER_BLOCK] * whole + ([rest] if rest else [])


def read_image_file(folder: Path, name: str) -> bytes:
    """The content of an image file, named relative to a folder.

    Raises:
        Unusable: it has no name or cannot be read.
    """
    if not name.strip():
        raise Unusable("image_missing", "the image has no path")
    try:
        return (folder / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise Unusable("image_missing", f"{folder / name}: {reason}") from error


class Texts:
    """Many strings in two buffers.

    Python counts references inside each object, so that a list of millions of strings would be
    copied, page by page, into every forked process that looks at it.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._content, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one string; what `surrogateescape` made of other bytes than UTF-8 is kept."""
        self._content += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        part = self._content[self._ends[index] : self._ends[index + 1]]
        return part.decode("utf-8", "surrogateescape")
