"""Counts what one training step of a loss communicates and computes, in the pool's processes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from loss_tasks import Task, options_of
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.parallel import collectives

BATCH, DIM, SAMPLES = 16, 8, 40


@dataclass(frozen=True)
class Counted:
    """One rank's bytes and collectives by kind, operations of matrix products, bytes of state."""

    sent: Counter[str]
    messages: int
    flops: int
    owned_bytes: int
    largest: int
    """Numbers in the largest tensor made under `no_grad`, where the prototypes step."""


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Counts the bytes that torch.distributed is called with; gathers and scatters in full."""
    found: Counter[str] = Counter()

    def watched(kind, function, whole):
        def call(*args, **kwargs):
            found[kind] += args[whole].numel() * args[whole].element_size()
            found["messages"] += 1
            return function(*args, **kwargs)

        return call

    gather = watched("gathered", collectives._all_gather, 0)
    scatter = watched("scattered", collectives._reduce_scatter, 1)
    reduce = watched("reduced", dist.all_reduce, 0)
    with (
        mock.patch.object(collectives, "_all_gather", gather),
        mock.patch.object(collectives, "_reduce_scatter", scatter),
        mock.patch.object(dist, "all_reduce", reduce),
    ):
        yield found


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def in_place(left, *shapes, out_shape=None, **_) -> int:
    """Operations of `addmm_`."""
    rows, inner = shapes[0]
    return 2 * rows * inner * shapes[1][1]


def count(task: Task) -> Counted:
    """The third step of a loss, of which the first two are unlike the others."""
    torch.set_num_threads(1)
    loss = create_loss(
        task.name, embed_dim=DIM, steps_per_epoch=1, num_samples=SAMPLES, **task.settings
    )
    loss.attach(equal_batches=True)
    share = BATCH // collectives.world_size()
    own = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        features = functional.normalize(torch.randn(2, BATCH, DIM, generator=generator), dim=-1)
        leaf = features[:, own].clone().requires_grad_()
        scale = torch.tensor(9.0, requires_grad=True)
        given = options_of(number, BATCH, DIM) if task.options else {}
        if given:
            given["negative_features"] = given["negative_features"].float().requires_grad_()
        mapping = {torch.ops.aten.addmm_: in_place}
        with (
            traffic() as sent,
            FlopCounterMode(display=False, custom_mapping=mapping) as counter,
            Largest() as largest,
        ):
            value = loss(
                leaf[0],
                leaf[1],
                scale,
                torch.tensor(-9.0),
                sample_ids=torch.arange(BATCH)[own],
                **{name: each[own] for name, each in given.items()},
                **keys_for(loss, leaf),
            )
            value.backward()
    messages = sent.pop("messages", 0)
    kept = sum(each.numel() * each.element_size() for each in loss.buffers())
    return Counted(sent, messages, counter.get_total_flops(), kept, largest.numbers)
