"""Batches from a source, in an order that any step of any epoch can be resumed at.

The plain torch `DataLoader` runs the workers. What travels to them is a whole batch's request
(epoch, place, positions), so workers hold no state: their number changes nothing, they live on
from epoch to epoch, and a run resumes at (epoch, step) with as many of them as it likes.

Step t takes the places t*B ... (t+1)*B of the epoch's order, rank r its r-th part of them, cut into
`accum_freq` micro-batches: the global batches are the same for any number of either.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from neuclip.config.batch_size import factors
from neuclip.data.batch import Batch, Reader, Request, Tokenize, Transform, Unreadable
from neuclip.data.damage import DamageLog
from neuclip.data.decode import Decode, decode_image
from neuclip.data.order import Order, describe_epoch
from neuclip.data.samples import Damage
from neuclip.data.sources.source import Source
from neuclip.errors import UserError

__all__ = [
    "Batch",
    "DamageLog",
    "LoaderSettings",
    "TrainLoader",
    "Unreadable",
    "evaluation_loader",
    "evaluation_requests",
]


_LARGEST_SHUFFLE = 2**26  # samples: half a gigabyte per process for the order of an epoch
_LARGE_WINDOW = 64  # shards shuffled together beyond that


@dataclass(frozen=True)
class LoaderSettings:
    """How a `TrainLoader` reads.

    Attributes:
        batch_size: samples per rank and micro-batch.
        rank: which part of the global batches this process reads.
        world_size: number of ranks.
        accum_freq: micro-batches per rank and step.
        seed: decides order, substitutes and random transforms.
        workers: processes that read ahead; 0 reads in this one.
        num_samples: length of an epoch; by default that of the data.
        window: blocks of the source (shards) that are shuffled together, 0: all; by default what
            suits the source.
        pin_memory: hand out batches in page-locked memory.
        decode: makes pictures of image files.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accum_freq: int = 1
    seed: int = 0
    workers: int = 0
    num_samples: int | None = None
    window: int | None = None
    pin_memory: bool = False
    decode: Decode = decode_image

    @property
    def rank_batch(self) -> int:
        """Samples per rank and step."""
        return self.batch_size * self.accum_freq

    @property
    def global_batch(self) -> int:
        """Samples per step."""
        return self.rank_batch * self.world_size

    @property
    def factors(self) -> str:
        """What makes up the global batch, in words."""
        return factors(self.batch_size, self.accum_freq, self.world_size)


class TrainLoader:
    """Batches of an epoch from a position on; `len` is the number of steps in an epoch.

    Iterating yields the micro-batches of what is left of the epoch, `accum_freq` for each step, and
    then stands at the start of the next one.

    Attributes:
        description: what an epoch visits, repeats and leaves out, in one sentence.
        factors: what makes up a global batch, in words.
        global_batch_size: pairs in a step, over all processes.
        order_digest: equal for runs that visit equally many samples in the same order.
    """

    def __init__(
        self, source: Source, transform: Transform, tokenize: Tokenize, settings: LoaderSettings
    ) -> None:
        """Set up reading; worker processes start with the first iteration.

        Raises:
            UserError: an epoch has fewer samples than one global batch.
        """
        self._settings = settings
        window = _window(source, settings)
        order = Order(source.layout, settings.seed, length=settings.num_samples, window=window)
        length, global_batch = order.length, settings.global_batch
        self.factors = settings.factors
        self.global_batch_size = settings.global_batch
        self.order_digest = source.layout.digest(window, settings.num_samples)
        self._requests = _TrainRequests(order, settings, source.expect)
        if len(self._requests) == 0:
            raise UserError(
                f"an epoch of {length} samples is less than one global batch of {global_batch} "
                f"({settings.factors}): lower --batch-size, or read more data"
            )
        self.description = describe_epoch(source.layout, length, global_batch)
        reader = Reader(source, transform, tokenize, order, settings.decode)
        self._loader = _data_loader(reader, self._requests, settings)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; an incomplete last one is left out."""
        return len(self)

    def set_position(self, epoch: int, step: int) -> None:
        """Continue with batch `step` of `epoch`, both counted from 0."""
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"no epoch {epoch}, step {step}: an epoch has {len(self)} steps")
        self._requests.epoch, self._requests.step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._requests.epoch
        for result in self._loader:
            if isinstance(result, Unreadable):
                raise _too_much_damage(result.damage)
            yield result
        self.set_position(epoch + 1, 0)


def evaluation_requests(positions: NDArray[np.int64], batch_size: int) -> list[Request]:
    """The batches of some samples, in order; the last may be smaller."""
    starts = range(0, len(positions), batch_size)
    return [Request(0, start, positions[start : start + batch_size], False) for start in starts]


def evaluation_loader(
    source: Source,
    transform: Transform,
    tokenize: Tokenize,
    requests: Sequence[Request],
    workers: int = 0,
    *,
    pin_memory: bool = False,
) -> Iterator[Batch | Unreadable]:
    """The batches that were asked for, in order; reading ahead begins at once, not with the first.

    A damaged sample is left out and named in `damage`; a batch may be lost entirely.
    """
    workers = min(workers, len(requests))
    settings = LoaderSettings(1, workers=workers, pin_memory=pin_memory)
    reader = Reader(source, transform, tokenize, Order(source.layout, settings.seed))
    return iter(_data_loader(reader, list(requests), settings, lasting=False))


def _too_much_damage(damage: Sequence[Damage]) -> UserError:
    shown = "".join(f"\n  {found}" for found in damage[:5])
    return UserError(f"none of {len(damage)} samples tried could be read:{shown}")


def _window(source: Source, settings: LoaderSettings) -> int:
    """The window that was asked for, or that suits the source."""
    if settings.window is not None:
        return settings.window
    if source.shuffle_window == 0 and len(source) > _LARGEST_SHUFFLE:
        return _LARGE_WINDOW
    return source.shuffle_window


class _TrainRequests:
    """The sampler: requests for the rest of an epoch. It tells what will be read next."""

    def __init__(
        self, order: Order, settings: LoaderSettings, expect: Callable[[list[int]], None]
    ) -> None:
        self.epoch, self.step = 0, 0
        self._order, self._settings, self._expect = order, settings, expect

    def __len__(self) -> int:
        return self._order.length // self._settings.global_batch

    def __iter__(self) -> Iterator[Request]:
        epoch, size, settings = self.epoch, self._settings.batch_size, self._settings
        known = 0  # up to this place of the epoch, what is read was told
        for step in range(self.step, len(self)):
            first = step * settings.global_batch
            if first >= known:
                self._expect(self._order.blocks_ahead(epoch, first))
                known = self._order.window_end(epoch, first)
            own = first + settings.rank * settings.rank_batch
            for place in range(own, own + settings.rank_batch, size):
                yield Request(epoch, place, self._order.positions(epoch, place, place + size), True)


def _data_loader(
    reader: Reader,
    requests: _TrainRequests | list[Request],
    settings: LoaderSettings,
    lasting: bool = True,
) -> DataLoader[Batch | Unreadable]:
    return DataLoader(
        reader,
        batch_size=None,  # a request is a whole batch
        sampler=requests,
        collate_fn=_as_it_is,
        num_workers=settings.workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        persistent_workers=lasting and settings.workers > 0,
        pin_memory=settings.pin_memory,
        generator=torch.Generator(),  # by default it would draw from the training's own
    )


def _as_it_is(result: object) -> object:
    return result


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Let a worker live on when a scheduler or Ctrl-C signals the whole process group.

    The main process still needs batches to get to its checkpoint. A SIGTERM from that process
    itself is obeyed: it is how Python ends workers at exit, and it then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a process cannot learn who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
