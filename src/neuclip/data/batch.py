"""A batch, and the reader that fills it: the work of the worker processes."""

import contextlib
import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from neuclip.data.decode import Decode, decode_image
from neuclip.data.groups import NO_GROUP, image_id, text_id
from neuclip.data.order import Order, draw
from neuclip.data.samples import Damage, Sample, SampleError
from neuclip.data.sources.source import Source

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

CaptionChoice = Literal["random", "first", "all"]
"""Which captions of a sample a batch holds: one drawn for each visit, the first, or all.

The draw is a function of seed, epoch and place in the epoch, as for transforms: a resume repeats
it, and a sample visited twice in an epoch gets two draws.
"""

_ATTEMPTS = 20  # samples tried for one place before the loader gives up
_CACHED_CAPTIONS = 2**16
_INPUTS = ("images", "tokens", "groups", "pair_weights", "negative_tokens", "has_negative")
_CAPTION, _NEGATIVE = -1, -2  # in place of the number of an attempt, to draw a caption or negative


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch.

    Attributes:
        images: the transformed images.
        tokens: the tokens of the captions; one caption per sample unless all are read.
        sample_ids: stable ids, for per-sample state.
        class_indices: indices into the split's class names; -1 if a sample has none.
        captions: the captions as read.
        caption_owners: index in the batch of each caption's sample, if all captions are read;
            otherwise empty: there is one caption per sample, in order.
        digests: in evaluation, a 64-bit digest of each sample's image file, captions and class.
        groups: ids of the caption, the image file and the label of each sample, one column a kind;
            two samples are false negatives of each other if they agree in any column that is not 0.
            0: the sample has none. None: groups were not asked for (`--false-negatives keep`).
        pair_weights: weight of each pair in the loss, 0 or more; None without `--pair-weight-key`.
        negative_tokens: tokens of one hard negative caption per sample, in order; rows of samples
            without one hold the tokens of an empty text. None without `--hard-negative-key`.
        has_negative: whether a sample has a hard negative; None if `negative_tokens` is.
        keys: the keys of the samples.
        damage: corrupt samples that were replaced (in evaluation: left out).
        metadata: content of the samples' `.npy` files, if the split has them.
    """

    images: Float[Tensor, "batch 3 height width"]
    tokens: Int64[Tensor, "captions context"]
    sample_ids: Int64[Tensor, " batch"]
    class_indices: Int64[Tensor, " batch"]
    captions: list[str]
    keys: list[str]
    damage: tuple[Damage, ...] = ()
    metadata: tuple[bytes | None, ...] = ()
    caption_owners: tuple[int, ...] = ()
    digests: tuple[int, ...] = ()
    groups: Int64[Tensor, "batch kinds"] | None = None
    pair_weights: Float[Tensor, " batch"] | None = None
    negative_tokens: Int64[Tensor, "batch context"] | None = None
    has_negative: Bool[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that the step reads on the device, by field; those that the batch has."""
        found = {name: getattr(self, name) for name in _INPUTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def inputs_to(self, device: torch.device) -> "Batch":
        """A copy with `inputs` on a device; ids stay on the CPU, which checks bounds."""
        moved = {name: each.to(device, non_blocking=True) for name, each in self.inputs.items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which transfers to a GPU can overlap."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: v.pin_memory() for name, v in values.items() if isinstance(v, Tensor)}
        )


@dataclass(frozen=True)
class Request:
    """The samples of a batch.

    Attributes:
        epoch: index of the epoch.
        place: place of the first sample in the order of the epoch.
        positions: [batch] positions of the samples in the source.
        replace_damaged: replace corrupt samples instead of leaving them out.
        captions: which captions of each sample to read.
    """

    epoch: int
    place: int
    positions: NDArray[np.int64]
    replace_damaged: bool
    captions: CaptionChoice = "first"


@dataclass(frozen=True)
class Unreadable:
    """Replaces a batch that could not be filled."""

    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class Extras:
    """The optional fields of the batches of training.

    Attributes:
        groups: whether batches have `groups`.
        pair_weights: whether they have `pair_weights`.
        hard_negatives: whether they have `negative_tokens` and `has_negative`.
    """

    groups: bool = False
    pair_weights: bool = False
    hard_negatives: bool = False


class _Found(NamedTuple):
    """A sample and its position in the source.

    Attributes:
        sample: the sample.
        position: its position in the source.
        image_id: id of its image file, if batches have groups.
        digest: in evaluation, the digest of its content.
    """

    sample: Sample[Image.Image]
    position: int
    image_id: int = NO_GROUP
    digest: int | None = None


class _Chosen(NamedTuple):
    """The captions of a sample that a batch holds, and its hard negative; empty if it has none."""

    captions: tuple[str, ...]
    negative: str


class BatchReader(Dataset[Batch | Unreadable]):
    """Reads, transforms and tokenizes the samples of requests; stateless but for a cache."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenize: Tokenize,
        order: Order,
        decode: Decode = decode_image,
        extras: Extras | None = None,
    ) -> None:
        self._source, self._transform, self._tokenize = source, transform, tokenize
        self._order, self._decode, self._extras = order, decode, extras or Extras()
        self._cached_tokens: dict[str, NDArray[np.int32]] = {}

    def __getitem__(self, request: Request) -> Batch | Unreadable:
        damage: list[Damage] = []
        read: list[_Found] = []
        chosen: list[_Chosen] = []
        images: Tensor | None = None
        with _random_state_kept():
            for offset, position in enumerate(request.positions.tolist()):
                place = request.place + offset
                found = self._first_readable(request, place, position, damage)
                if found is None:
                    if request.replace_damaged:
                        return Unreadable(tuple(damage[-_ATTEMPTS:]))
                    continue
                _seed_transforms(draw(self._order.seed, request.epoch, place))
                image = self._transform(found.sample.image)
                if images is None:
                    images = _room_for(image, len(request.positions))
                # Written in place: a list to be stacked would be a second batch in memory.
                images[len(read)] = image
                chosen.append(self._chosen(found.sample, request, place))
                read.append(found)
        if images is None:
            return Unreadable(tuple(damage))
        return self._batch(request, images[: len(read)], read, chosen, damage)

    def _batch(
        self,
        request: Request,
        images: Tensor,
        read: list[_Found],
        chosen: list[_Chosen],
        damage: list[Damage],
    ) -> Batch:
        """The batch of the samples read."""
        samples = [found.sample for found in read]
        texts = [text for each in chosen for text in each.captions]
        owners = [number for number, each in enumerate(chosen) for _ in each.captions]
        classes = [-1 if s.class_index is None else s.class_index for s in samples]
        ids = [self._source.sample_id(found.position) for found in read]
        digests = [found.digest for found in read if found.digest is not None]
        weights = [sample.annotations.pair_weight for sample in samples]
        negatives = [each.negative for each in chosen]
        extras = self._extras
        return Batch(
            images=images,
            tokens=self._tokens(texts),
            sample_ids=torch.tensor(ids, dtype=torch.int64),
            class_indices=torch.tensor(classes, dtype=torch.int64),
            captions=texts,
            keys=[sample.key for sample in samples],
            damage=tuple(damage),
            metadata=tuple(sample.metadata for sample in samples),
            caption_owners=tuple(owners) if request.captions == "all" else (),
            digests=tuple(digests),
            groups=_group_ids(read, chosen) if extras.groups else None,
            pair_weights=torch.tensor(weights) if extras.pair_weights else None,
            negative_tokens=self._tokens(negatives) if extras.hard_negatives else None,
            has_negative=torch.tensor([*map(bool, negatives)]) if extras.hard_negatives else None,
        )

    def _chosen(self, sample: Sample[Image.Image], request: Request, place: int) -> _Chosen:
        """What is drawn of a sample; if one caption is wanted and there is none, an empty one."""
        captions, told = sample.captions, sample.annotations
        if request.captions == "all":
            return _Chosen(captions, "")
        caption, negative = sample.caption, ""
        if request.captions == "random" and len(captions) > 1:
            chance = draw(self._order.seed, request.epoch, place, _CAPTION)
            caption = _drawn(captions, told.caption_weights, chance)
        if told.negatives:
            chance = draw(self._order.seed, request.epoch, place, _NEGATIVE)
            negative = told.negatives[chance % len(told.negatives)]
        return _Chosen((caption,), negative)

    def _first_readable(
        self, request: Request, place: int, position: int, damage: list[Damage]
    ) -> _Found | None:
        """A sample or its replacement; adds corrupt ones to `damage`."""
        for attempt in range(_ATTEMPTS if request.replace_damaged else 1):
            if attempt:
                position = self._order.substitute(request.epoch, place, attempt)
            try:
                if not request.replace_damaged:
                    sample = self._source.read_with(position, self._decode_and_hash)
                    image, digest = sample.image
                    digest = _add_texts(digest, sample)
                    return _Found(sample.with_image(image), position, digest=digest)
                if self._extras.groups:
                    sample = self._source.read_with(position, self._decode_and_id)
                    image, number = sample.image
                    return _Found(sample.with_image(image), position, number)
                return _Found(self._source.read_with(position, self._decode), position)
            except SampleError as error:
                damage.append(error.damage)
        return None

    def _decode_and_hash(self, content: bytes) -> tuple[Image.Image, hashlib.blake2b]:
        return self._decode(content), hashlib.blake2b(content, digest_size=8)

    def _decode_and_id(self, content: bytes) -> tuple[Image.Image, int]:
        return self._decode(content), image_id(content)

    def _tokens(self, captions: list[str]) -> Int64[Tensor, "batch context"]:
        """Tokenizes captions, with a bounded cache for captions that repeat."""
        if not captions:  # all captions are read, and no sample has one
            return self._tokenize([""])[:0].to(torch.int64)
        cache = self._cached_tokens
        new = [caption for caption in dict.fromkeys(captions) if caption not in cache]
        rows = self._tokenize(new).to(torch.int32).numpy() if new else ()
        fresh = {caption: row.copy() for caption, row in zip(new, rows, strict=True)}
        tokens = np.stack([fresh[c] if c in fresh else cache[c] for c in captions])
        if len(cache) + len(fresh) <= _CACHED_CAPTIONS:
            cache.update(fresh)
        return torch.from_numpy(tokens).to(torch.int64)


def _drawn(captions: tuple[str, ...], weights: tuple[float, ...], chance: int) -> str:
    """One of several captions, by a random 64-bit number."""
    if not weights:
        return captions[chance % len(captions)]
    ends = list(accumulate(weights))
    # Rounding may reach the last end.
    return captions[min(bisect_right(ends, chance / 2**64 * ends[-1]), len(captions) - 1)]


def _group_ids(read: list[_Found], chosen: list[_Chosen]) -> Int64[Tensor, "batch kinds"]:
    """The ids of the drawn captions, images and labels: the columns of `KINDS`."""
    rows = [
        (text_id(each.captions[0]), found.image_id, text_id(found.sample.annotations.label))
        for found, each in zip(read, chosen, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64)


def _add_texts(image: hashlib.blake2b, sample: Sample[Any]) -> int:
    """The digest of a sample's content, from the hash of its image file."""
    for text in (*sample.captions, f"class {sample.class_index}"):
        image.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(image.digest(), "little")


def _seed_transforms(seed: int) -> None:
    # Not torch.manual_seed: it formats a stack trace for CUDA, which takes longer than decoding.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _random_state_kept() -> Generator[None]:
    """Restores the random state: with `workers=0` the transforms run in the training process."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _room_for(image: Tensor, count: int) -> Tensor:
    """An empty batch of images; in a reading process in shared memory, to be passed as it is."""
    shape = (count, *image.shape)
    if get_worker_info() is not None:
        with contextlib.suppress(RuntimeError):  # /dev/shm is full
            # As torch's own collate function does it.
            storage = torch.UntypedStorage._new_shared(  # pyright: ignore[reportPrivateUsage]
                count * image.numel() * image.element_size()
            )
            return image.new_empty(0).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]
    return image.new_empty(shape)
