"""Batches from a source, in an order that can be resumed at any step of any epoch.

Torch's `DataLoader` runs the workers. Each of them receives requests for full batches (epoch,
place, positions) and keeps no state. Their number therefore changes nothing, they live on from
epoch to epoch, and a run resumes at (epoch, step) with any number of workers.

Step t takes the places t*B to (t+1)*B of the epoch's order, and rank r the r-th part of them, cut
into `accum_freq` micro-batches. The global batches are the same for any number of ranks and
micro-batches.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from neuclip.config.batch_size import check_epoch, factors
from neuclip.data.batch import (
    Batch,
    BatchReader,
    CaptionChoice,
    Extras,
    Request,
    Tokenize,
    Transform,
    Unreadable,
)
from neuclip.data.decode import Decode, decode_image
from neuclip.data.distinct import Distinct
from neuclip.data.epoch_description import describe_distinct, describe_epoch
from neuclip.data.order import Order
from neuclip.data.reading import STALL_LIMIT, WORD_AFTER, Passed, PassingReader, Reading
from neuclip.data.samples import Damage
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity

_LARGEST_SHUFFLE = 2**26  # samples; the order of an epoch then takes 0.5 GB per process
_LARGE_WINDOW = 64  # shards shuffled together above that size


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of a `TrainLoader`.

    Attributes:
        batch_size: samples per rank and micro-batch.
        rank: rank of this process.
        world_size: number of ranks.
        accum_freq: micro-batches per rank and step.
        seed: seed of order, replacements and random transforms.
        workers: reading processes; 0: read in this process.
        num_samples: samples in an epoch; None: a round of the data.
        window: blocks (shards) shuffled together; 0: all; None: chosen for the source.
        pin_memory: return batches in page-locked memory.
        stall_limit: seconds without a batch after which reading fails.
        decode: decodes image files.
        caption_choice: the caption of a sample that has several.
        extras: the optional fields of batches.
        components: [samples] the component of each sample, for an order in which no batch holds two
            of one (`--no-duplicates`); None: any order.
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
    stall_limit: float = STALL_LIMIT
    decode: Decode = decode_image
    caption_choice: CaptionChoice = "random"
    extras: Extras = field(default_factory=Extras)
    components: NDArray[np.int64] | None = None

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
        """The factors of the global batch size, for messages."""
        return factors(self.batch_size, self.accum_freq, self.world_size)


class TrainLoader:
    """Batches of an epoch from a position on; `len` is the number of steps in an epoch.

    Iterating yields the remaining micro-batches of the epoch, `accum_freq` per step, and moves the
    position to the start of the next epoch.

    Attributes:
        description: how often an epoch visits the samples, in one sentence.
        factors: the factors of the global batch size, for messages.
        global_batch_size: pairs per step over all ranks.
        order_digest: digest of everything but the seed that decides the order.
    """

    def __init__(
        self, source: Source, transform: Transform, tokenize: Tokenize, settings: LoaderSettings
    ) -> None:
        """Sets up reading; worker processes start with the first iteration.

        Raises:
            UserError: an epoch has fewer samples than one global batch.
        """
        self._settings = settings
        window = _window(source, settings)
        length, global_batch = settings.num_samples, settings.global_batch
        distinct = _distinct(source, settings)
        order = Order(source.layout, settings.seed, length=length, window=window, distinct=distinct)
        length = order.length
        self.factors = settings.factors
        self.global_batch_size = settings.global_batch
        self.order_digest = source.layout.digest(window, settings.num_samples)
        if distinct is not None:
            self.order_digest += distinct.digest
        self._requests = _TrainRequests(order, settings, source.expect)
        check_epoch(length, global_batch, settings.factors)
        self.description = describe_epoch(source.layout, length, global_batch)
        if distinct is not None:
            self.description += f"; {describe_distinct(order, distinct)}"
        reader = BatchReader(source, transform, tokenize, order, settings.decode, settings.extras)
        self._reading = _reading(reader, self._requests, settings)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; an incomplete last one is dropped."""
        return len(self)

    def set_position(self, epoch: int, step: int, stop: int | None = None) -> None:
        """Continues with step `step` of epoch `epoch`, both counted from 0.

        Args:
            epoch: index of the epoch.
            step: the first step that is read.
            stop: the step before which the next iteration ends; none: the end of the epoch.
        """
        stop = len(self) if stop is None else stop
        if epoch < 0 or not 0 <= step <= stop <= len(self):
            raise ValueError(f"no epoch {epoch}, step {step}: an epoch has {len(self)} steps")
        self._requests.epoch, self._requests.step, self._requests.stop = epoch, step, stop

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._requests.epoch
        for result in self._reading.start():
            if isinstance(result, Unreadable):
                raise _nothing_readable(result.damage)
            yield result
        self.set_position(epoch + 1, 0)


def evaluation_requests(
    positions: NDArray[np.int64], batch_size: int, captions: CaptionChoice = "first"
) -> list[Request]:
    """Requests for batches of the given samples, in order; the last batch may be smaller."""
    return [
        Request(0, start, positions[start : start + batch_size], False, captions)
        for start in range(0, len(positions), batch_size)
    ]


def evaluation_loader(
    source: Source,
    transform: Transform,
    tokenize: Tokenize,
    requests: Sequence[Request],
    settings: LoaderSettings,
) -> Iterator[Batch | Unreadable]:
    """Reads the requested batches in order; workers start at once, not with the first batch.

    Corrupt samples are left out and listed in the batch's `damage`. A batch without any readable
    sample is `Unreadable`.

    Args:
        source: the samples.
        transform: makes tensors of images.
        tokenize: makes tokens of captions.
        requests: the batches.
        settings: `workers`, `pin_memory` and `stall_limit`; the requests hold the rest.
    """
    settings = replace(settings, workers=min(settings.workers, len(requests)))
    reader = BatchReader(source, transform, tokenize, Order(source.layout, settings.seed))
    return _reading(reader, list(requests), settings, lasting=False).start()


def _nothing_readable(damage: Sequence[Damage]) -> UserError:
    shown = "".join(f"\n  {found}" for found in damage[:5])
    return UserError(f"none of {quantity(len(damage), 'sample')} tried could be read:{shown}")


def _window(source: Source, settings: LoaderSettings) -> int:
    """The window in the settings, or one chosen for the source."""
    if settings.window is not None:
        return settings.window
    if source.shuffle_window == 0 and len(source) > _LARGEST_SHUFFLE:
        return _LARGE_WINDOW
    return source.shuffle_window


def _distinct(source: Source, settings: LoaderSettings) -> Distinct | None:
    """How visits are dealt to batches without duplicates, if they are.

    Raises:
        UserError: the number of visits of a sample differs from round to round.
    """
    if settings.components is None:
        return None
    if any(span.extra_visits for span in source.layout.spans):
        raise UserError(
            "--no-duplicates needs whole numbers in --train-data-upsampling-factors: otherwise the "
            "number of batches without duplicates differs from round to round"
        )
    return Distinct(settings.components, settings.global_batch)


class _TrainRequests:
    """The sampler: requests for the rest of an epoch. It announces the blocks read next."""

    def __init__(
        self, order: Order, settings: LoaderSettings, expect: Callable[[list[int]], None]
    ) -> None:
        self.epoch, self.step = 0, 0
        self._order, self._settings, self._expect = order, settings, expect
        self.stop = len(self)

    def __len__(self) -> int:
        return self._order.length // self._settings.global_batch

    def __iter__(self) -> Iterator[Request]:
        epoch, size, settings = self.epoch, self._settings.batch_size, self._settings
        known = 0  # the blocks up to this place of the epoch are announced
        for step in range(self.step, self.stop):
            first = step * settings.global_batch
            if first >= known:
                self._expect(self._order.blocks_ahead(epoch, first))
                known = self._order.window_end(epoch, first)
            start = first + settings.rank * settings.rank_batch
            for place in range(start, start + settings.rank_batch, size):
                positions = self._order.positions(epoch, place, place + size)
                yield Request(epoch, place, positions, True, settings.caption_choice)


def _reading(
    reader: BatchReader,
    requests: _TrainRequests | list[Request],
    settings: LoaderSettings,
    lasting: bool = True,
) -> Reading:
    loader: DataLoader[Passed] = DataLoader(
        PassingReader(reader),
        batch_size=None,  # a request is a full batch
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=settings.workers,
        timeout=WORD_AFTER if settings.workers else 0,
        worker_init_fn=_prepare_worker,
        persistent_workers=lasting and settings.workers > 0,
        pin_memory=settings.pin_memory,
        generator=torch.Generator(),  # the default would draw from the training's generator
    )
    return Reading(loader, settings.stall_limit)


def _unchanged(result: object) -> object:
    return result


def _prepare_worker(worker: int) -> None:
    _ignore_signals()
    _ignore_broken_passing()


def _ignore_broken_passing() -> None:
    """Keeps quiet if the main process ends while it fetches a batch from this process."""
    print_error = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        passing = threading.current_thread() is not threading.main_thread()
        if not (passing and isinstance(error, (ConnectionError, EOFError))):
            print_error(kind, error, trace)

    sys.excepthook = hook


def _ignore_signals() -> None:
    """Keeps a worker alive when a scheduler or Ctrl-C signals the whole process group.

    The main process still needs batches until its checkpoint. Only a SIGTERM from the main process
    ends the worker: Python sends it at exit, and waits for the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            threading.Thread(target=_end_on_sigterm_of_parent, daemon=True).start()
        except RuntimeError:  # no more threads are allowed: any SIGTERM ends the worker
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_on_sigterm_of_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
