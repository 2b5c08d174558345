"""Examines a random subset of a source: sizes, captions, corrupt samples, examples."""

import base64
import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from neuclip.config.data_sections import MAX_IMAGE_PIXELS
from neuclip.data.batch import Tokenize
from neuclip.data.damage import DamageLog
from neuclip.data.decode import ImageDecoder, ImageFacts
from neuclip.data.groups import image_id
from neuclip.data.progress import Progress
from neuclip.data.samples import SampleError
from neuclip.data.sources.shards import ShardIndex
from neuclip.data.sources.source import Source
from neuclip.data.tools.duplicates import Duplicates
from neuclip.data.truncation import count_truncated
from neuclip.errors import UserError

THUMBNAIL = 160  # longer side of an example in pixels
EXAMPLES = 24
"""Number of samples to keep as thumbnails."""


@dataclass(frozen=True)
class Example:
    """A sample to show.

    Attributes:
        key: key of the sample.
        shard: path or address of its shard.
        caption: the caption.
        size: width and height of the image in pixels.
        jpeg: a thumbnail as JPEG in base64.
    """

    key: str
    shard: str
    caption: str
    size: tuple[int, int]
    jpeg: str


@dataclass
class Inspection:
    """The result of an inspection; everything from `damage` on is about the samples read.

    Attributes:
        name: the user's name of the source.
        samples: number of samples in the source.
        blocks: number of shards, row groups or the like.
        file_bytes: total size of the shards in bytes; None for other sources.
        read: number of samples read.
        unused: what the source holds but does not read, in one line per reason.
        damage: corrupt samples.
        formats: counts of image formats, by Pillow's names.
        modes: counts of colour modes, by Pillow's names.
        rotated: number of images with an EXIF rotation.
        sizes: width and height of each image in pixels.
        image_bytes: size of each image file in bytes.
        caption_numbers: number of captions of each sample.
        caption_lengths: length of each caption in characters.
        context: number of tokens that the tokenizer keeps; None if captions were not tokenized.
        truncated: number of captions with more tokens.
        duplicates: which of the samples share a caption, an image file or a label.
        examples: some samples, spread over the source.
    """

    name: str
    samples: int
    blocks: int
    file_bytes: int | None
    read: int
    unused: tuple[str, ...] = ()
    damage: DamageLog = field(default_factory=DamageLog)
    formats: Counter[str] = field(default_factory=Counter[str])
    modes: Counter[str] = field(default_factory=Counter[str])
    rotated: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    image_bytes: list[int] = field(default_factory=list[int])
    caption_numbers: list[int] = field(default_factory=list[int])
    caption_lengths: list[int] = field(default_factory=list[int])
    context: int | None = None
    truncated: int = 0
    duplicates: Duplicates = field(default_factory=Duplicates)
    examples: list[Example] = field(default_factory=list[Example])

    @property
    def good(self) -> int:
        """Number of samples that were read without error."""
        return len(self.sizes)

    def epoch_seconds(self, samples_per_second: float) -> float:
        """Duration of an epoch in seconds, at a rate in samples per second."""
        return self.samples / samples_per_second


def inspect(
    source: Source,
    name: str,
    max_samples: int,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    tokenize: Tokenize | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Reads random samples of a source, in storage order.

    Args:
        source: the source.
        name: the user's name of the source.
        max_samples: number of samples to read and decode.
        max_pixels: images with more pixels count as corrupt.
        tokenize: counts the captions that are longer than its context.
        progress: called every hundred samples.

    Raises:
        UserError: the source is empty.
    """
    if not len(source):
        raise UserError(f"{name} contains no samples")
    chance = np.random.default_rng(0)
    count = min(max_samples, len(source))
    drawn = np.sort(chance.choice(len(source), count, replace=False)).tolist()
    shown = set(np.linspace(0, count - 1, min(EXAMPLES, count)).astype(int).tolist())
    blocks, file_bytes = len(source.layout.ends), _file_bytes(source)
    found = Inspection(name, len(source), blocks, file_bytes, count, source.unused)
    found.damage.add(source.damage)
    found.context = getattr(tokenize, "context_length", None)
    # Thumbnails need no larger scale. All bytes of a JPEG are still read, so corruption is found.
    decoder = ImageDecoder(max_pixels, THUMBNAIL)
    for number, position in enumerate(drawn):
        if progress is not None and number % 100 == 0:
            progress("reading", number, count)
        try:
            captions = _add(found, source, position, decoder, show=number in shown)
        except SampleError as error:
            found.damage.add([error.damage])
        else:
            if tokenize is not None:
                found.truncated += count_truncated(tokenize, captions)
    return found


@dataclass(frozen=True)
class _ReadImage:
    image: Image.Image
    facts: ImageFacts
    file_bytes: int
    file_id: int


def _add(
    found: Inspection, source: Source, position: int, decode: ImageDecoder, *, show: bool
) -> tuple[str, ...]:
    """Adds one sample to the result, and returns its captions; raises `SampleError`."""

    def read(content: bytes) -> _ReadImage:
        facts = decode.facts(content)
        return _ReadImage(decode(content), facts, len(content), image_id(content))

    sample = source.read_with(position, read)
    facts = sample.image.facts
    found.formats[facts.format] += 1
    found.modes[facts.mode] += 1
    found.rotated += facts.rotated
    found.sizes.append(facts.size)
    found.image_bytes.append(sample.image.file_bytes)
    found.caption_numbers.append(len(sample.captions))
    found.caption_lengths += map(len, sample.captions)
    found.duplicates.add(sample.with_image(sample.image.file_id))
    if show:
        shard = str(source.locate(position)[0])
        jpeg = _thumbnail(sample.image.image)
        found.examples.append(Example(sample.key, shard, sample.caption, facts.size, jpeg))
    return sample.captions


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _file_bytes(source: Source) -> int | None:
    if not isinstance(source, ShardIndex):
        return None
    return sum(shard.stat().st_size for shard in source.shards if shard.exists())
