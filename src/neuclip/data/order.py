"""In which order an epoch visits the samples, and every other choice that is left to chance.

Pure functions of (seed, epoch, position): nothing depends on worker processes, ranks or history,
so any place in any epoch can be reached without replaying what came before it.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray


def epoch_order(samples: int, length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples that an epoch of `length` visits, in order.

    One shuffle of all samples after another, cut at `length`: no sample comes a second time
    before all have come once.

    Args:
        samples: how many samples there are.
        length: how many the epoch visits.
        seed: of the run, not negative.
        epoch: counted from 0.
    """
    # Raw bits instead of Generator.permutation: numpy keeps the former the same in all versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    rounds = -(-length // samples)
    shuffles = [np.argsort(bits.random_raw(samples), kind="stable") for _ in range(rounds)]
    return np.concatenate(shuffles)[:length].astype(np.int64, copy=False)


def draw(seed: int, epoch: int, position: int, attempt: int = 0) -> int:
    """A 64-bit number for one place in one epoch: seeds transforms, picks substitutes."""
    place = struct.pack("<4q", seed, epoch, position, attempt)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")


def describe_epoch(samples: int, length: int, global_batch: int) -> str:
    """What an epoch visits, repeats and leaves out, in one sentence for the log."""
    steps, rest = divmod(length, global_batch)
    used = length - rest
    text = f"an epoch is {used:,} samples: {steps:,} steps of {global_batch:,}"
    if used > samples:
        often, more = divmod(used, samples)
        text += f"; each of the {samples:,} samples comes {often:,} time(s), {more:,} once more"
    elif used < samples:
        text += f"; {samples - used:,} of the {samples:,} samples are left out, others each epoch"
    return text
