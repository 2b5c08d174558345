"""A batch, and the reader that fills one: the work of the worker processes."""

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from neuclip.data.decode import Decode, decode_image
from neuclip.data.order import Order, draw
from neuclip.data.samples import Damage, RawSample, SampleError
from neuclip.data.sources.source import Source

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

_ATTEMPTS = 20  # samples tried for one place before a loader gives up
_CACHED_CAPTIONS = 2**16


@dataclass(frozen=True)
class Batch:
    """Samples of one step.

    Attributes:
        images: what the transform makes of the pictures.
        tokens: the captions' tokens.
        sample_ids: stable ids, for state kept by sample.
        class_indices: indices into the split's class names; -1 where there is none.
        captions: the captions as read.
        keys: the keys of the samples.
        damage: what could not be read and was replaced (in evaluation: left out).
        metadata: content of the samples' `.npy`, where a split has them.
    """

    images: Float[Tensor, "batch 3 height width"]
    tokens: Int64[Tensor, "batch context"]
    sample_ids: Int64[Tensor, " batch"]
    class_indices: Int64[Tensor, " batch"]
    captions: list[str]
    keys: list[str]
    damage: tuple[Damage, ...] = ()
    metadata: tuple[bytes | None, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def inputs_to(self, device: torch.device) -> "Batch":
        """The same batch with images and tokens on `device`; ids stay where bounds are checked."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, tokens=self.tokens.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where copies to a GPU can overlap."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        )


@dataclass(frozen=True)
class Request:
    """What a worker makes a batch of: samples `positions`, from `place` of the epoch's order on."""

    epoch: int
    place: int
    positions: NDArray[np.int64]
    replace_damaged: bool


@dataclass(frozen=True)
class Unreadable:
    """In place of a batch that could not be filled."""

    damage: tuple[Damage, ...]


class Reader(Dataset[Batch | Unreadable]):
    """Fills requests; works the same in any process."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenize: Tokenize,
        order: Order,
        decode: Decode = decode_image,
    ) -> None:
        self._source, self._transform, self._tokenize = source, transform, tokenize
        self._order, self._decode = order, decode
        self._cached_tokens: dict[str, NDArray[np.int32]] = {}

    def __getitem__(self, request: Request) -> Batch | Unreadable:
        damage: list[Damage] = []
        samples: list[RawSample] = []
        images: Tensor | None = None
        ids: list[int] = []
        with _random_state_restored():
            for offset, position in enumerate(request.positions.tolist()):
                place = request.place + offset
                found = self._first_readable(request, place, position, damage)
                if found is None:
                    if request.replace_damaged:
                        return Unreadable(tuple(damage[-_ATTEMPTS:]))
                    continue
                sample, position = found
                _seed_transforms(draw(self._order.seed, request.epoch, place))
                image = self._transform(sample.image)
                if images is None:
                    images = image.new_empty((len(request.positions), *image.shape))
                # At once to its place: a list to stack at the end is a second batch in memory.
                images[len(samples)] = image
                samples.append(sample)
                ids.append(self._source.sample_id(position))
        if images is None:
            return Unreadable(tuple(damage))
        captions = [sample.caption for sample in samples]
        classes = [-1 if s.class_index is None else s.class_index for s in samples]
        return Batch(
            images=images[: len(samples)],
            tokens=self._tokens(captions),
            sample_ids=torch.tensor(ids, dtype=torch.int64),
            class_indices=torch.tensor(classes, dtype=torch.int64),
            captions=captions,
            keys=[sample.key for sample in samples],
            damage=tuple(damage),
            metadata=tuple(sample.metadata for sample in samples),
        )

    def _first_readable(
        self, request: Request, place: int, position: int, damage: list[Damage]
    ) -> tuple[RawSample, int] | None:
        """The sample asked for or a substitute, with its position; adds to `damage`."""
        for attempt in range(_ATTEMPTS if request.replace_damaged else 1):
            if attempt:
                position = self._order.substitute(request.epoch, place, attempt)
            try:
                return self._source.read(position, self._decode), position
            except SampleError as error:
                damage.append(error.damage)
        return None

    def _tokens(self, captions: list[str]) -> Int64[Tensor, "batch context"]:
        """Tokens of captions, remembered up to a limit: where captions repeat, it is most of it."""
        cache = self._cached_tokens
        new = [caption for caption in dict.fromkeys(captions) if caption not in cache]
        rows = self._tokenize(new).to(torch.int32).numpy() if new else ()
        fresh = {caption: row.copy() for caption, row in zip(new, rows, strict=True)}
        tokens = np.stack([fresh[c] if c in fresh else cache[c] for c in captions])
        if len(cache) + len(fresh) <= _CACHED_CAPTIONS:
            cache.update(fresh)
        return torch.from_numpy(tokens).to(torch.int64)


def _seed_transforms(seed: int) -> None:
    # Not torch.manual_seed: it formats a stack trace for CUDA's sake, longer than a decode.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _random_state_restored() -> Generator[None]:
    """Keep the random numbers of a process that reads for itself out of the transforms' hands."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
