"""What a source holds: counts, sizes, captions, damage, examples, from a bounded sample of it."""

import base64
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from neuclip.config.sections import MAX_IMAGE_PIXELS
from neuclip.data.damage import DamageLog
from neuclip.data.decode import ImageDecoder
from neuclip.data.samples import SampleError, Unusable
from neuclip.data.sources.shards import ShardIndex
from neuclip.data.sources.source import Source, sample_error
from neuclip.errors import UserError

THUMBNAIL = 160  # longer side of an example in pixels


@dataclass(frozen=True)
class Example:
    """A sample to show; `jpeg` is base64."""

    key: str
    shard: str
    caption: str
    size: tuple[int, int]
    jpeg: str


@dataclass
class Inspection:
    """What is known of a source.

    Attributes:
        name: what the user calls it.
        samples: how many it has.
        blocks: shards, row groups or the like.
        file_bytes: size of its files, where it consists of shards.
        looked_at: samples read for all that follows.
        damage: what could not be read.
        formats: image formats, by Pillow's names.
        modes: colour modes, by Pillow's names.
        rotated: pictures with an EXIF rotation.
        sizes: width and height of each picture in pixels.
        image_bytes: size of each image file.
        caption_lengths: characters of each caption.
        examples: some samples, spread over the source.
    """

    name: str
    samples: int
    blocks: int
    file_bytes: int | None
    looked_at: int
    damage: DamageLog = field(default_factory=DamageLog)
    formats: Counter[str] = field(default_factory=Counter[str])
    modes: Counter[str] = field(default_factory=Counter[str])
    rotated: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    image_bytes: list[int] = field(default_factory=list[int])
    caption_lengths: list[int] = field(default_factory=list[int])
    examples: list[Example] = field(default_factory=list[Example])

    @property
    def good(self) -> int:
        """Samples that can be used, of those looked at."""
        return len(self.sizes)

    def epoch_seconds(self, samples_per_second: float) -> float:
        """Length of an epoch at a given rate."""
        return self.samples / samples_per_second


def inspect(
    source: Source,
    name: str,
    max_samples: int,
    *,
    examples: int = 24,
    max_pixels: int = MAX_IMAGE_PIXELS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Look at samples drawn at random, in the order in which they lie.

    Args:
        source: what is looked at.
        name: what the user calls it.
        max_samples: how many samples to read and decode.
        examples: how many of them to keep as small pictures.
        max_pixels: larger pictures count as damaged.
        progress: called with what is being done, and how many samples are done and all.

    Raises:
        UserError: the source is empty.
    """
    if not len(source):
        raise UserError(f"{name} holds no samples")
    chance = np.random.default_rng(0)
    count = min(max_samples, len(source))
    drawn = np.sort(chance.choice(len(source), count, replace=False)).tolist()
    shown = set(np.linspace(0, count - 1, min(examples, count)).astype(int).tolist())
    found = Inspection(name, len(source), len(source.layout.ends), _file_bytes(source), count)
    found.damage.add(source.damage)
    # Small pictures need no more; the whole of a JPEG is still read, so damage shows.
    decoder = ImageDecoder(max_pixels, THUMBNAIL)
    for number, position in enumerate(drawn):
        if progress is not None and number % 100 == 0:
            progress("looking", number, count)
        try:
            _look(source, position, decoder, found, show=number in shown)
        except SampleError as error:
            found.damage.add([error.damage])
    return found


def _look(
    source: Source, position: int, decode: ImageDecoder, found: Inspection, *, show: bool
) -> None:
    """Add one sample to what was found; raises `SampleError`."""
    content = source.content(position)
    try:
        facts = decode.facts(content.image)
        image = decode(content.image)
    except Unusable as error:
        raise sample_error(str(source.locate(position)[0]), content.key, error) from error
    found.formats[facts.format] += 1
    found.modes[facts.mode] += 1
    found.rotated += facts.rotated
    found.sizes.append(facts.size)
    found.image_bytes.append(len(content.image))
    found.caption_lengths.append(len(content.caption))
    if show:
        shard = str(source.locate(position)[0])
        jpeg = _thumbnail(image)
        found.examples.append(Example(content.key, shard, content.caption, facts.size, jpeg))


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _file_bytes(source: Source) -> int | None:
    if not isinstance(source, ShardIndex):
        return None
    return sum(shard.stat().st_size for shard in source.shards if shard.exists())
