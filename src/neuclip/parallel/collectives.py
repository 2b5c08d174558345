"""Collectives on plain tensors and Python objects, each the identity for a single process.

Callers need no special case for world size 1. A global batch is the ranks' local batches in rank
order.
"""

import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neuclip.errors import UserError
from neuclip.parallel import process_group

T = TypeVar("T")
_every_rank_alone = False


def _renamed(new: str, old: str) -> Callable[..., object]:
    """A collective by its newer name, or by its older one in older releases of torch."""
    return getattr(dist, new, None) or getattr(dist, old)


_all_gather = _renamed("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Slice:
    """This rank's contiguous share [start, stop) of a global axis."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def is_active() -> bool:
    """Whether the run has more than one process."""
    if _every_rank_alone:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Generator[None]:
    """Makes every rank act as a single process within a `with` block."""
    global _every_rank_alone
    before, _every_rank_alone = _every_rank_alone, True
    try:
        yield
    finally:
        _every_rank_alone = before


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """The rank of this process, 0 for a single process."""
    return dist.get_rank() if is_active() else 0


def is_main() -> bool:
    """Whether this process, rank 0, writes files and talks to the user."""
    return rank() == 0


@dataclass(frozen=True)
class BatchLayout:
    """The distribution of a global batch's pairs over the ranks, in rank order.

    Attributes:
        sizes: number of pairs on each rank.
        rank: of this process.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """Number of pairs on all ranks."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """Index of this rank's first pair in the global batch."""
        return sum(self.sizes[: self.rank])

    @property
    def even(self) -> bool:
        """Whether all ranks hold the same number of pairs."""
        return len(set(self.sizes)) == 1

    def mean(self, values: Tensor) -> Tensor:
        """Mean over this rank's pairs (last axis), weighted: its mean over ranks is the global one.

        Gradients are averaged over ranks (as DDP does), so a rank with more pairs than others must
        count for more.
        """
        mean = values.mean(-1)
        if self.even:
            return mean
        return mean * (len(self.sizes) * self.sizes[self.rank] / self.total)

    def own(self, full: Tensor) -> Tensor:
        """This rank's rows of a tensor over the global batch (axis 1)."""
        return full.narrow(1, self.start, self.sizes[self.rank])


def _padded(layout: BatchLayout, local: Tensor) -> Tensor:
    """Zero-pads to the longest rank's length; collectives need equal shapes."""
    if layout.even:
        return local.contiguous()
    padded = local.new_zeros((max(layout.sizes), *local.shape[1:]))
    padded[: len(local)] = local
    return padded


def _unpadded(layout: BatchLayout, gathered: Tensor) -> Tensor:
    """Removes the padding from the concatenation of the ranks' padded tensors."""
    if layout.even:
        return gathered
    parts = zip(gathered.split(max(layout.sizes)), layout.sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def _padded_parts(layout: BatchLayout, full: Tensor) -> Tensor:
    """The inverse of `_unpadded`."""
    if layout.even:
        return full.contiguous()
    longest = max(layout.sizes)
    padded = full.new_zeros((len(layout.sizes), longest, *full.shape[1:]))
    for row, part in zip(padded, full.split(layout.sizes), strict=True):
        row[: len(part)] = part
    return padded.flatten(0, 1)


def layout_of(local: int, *, equal: bool = False) -> BatchLayout:
    """The number of pairs on every rank.

    Args:
        local: number of pairs on this rank.
        equal: set if all ranks are known to hold the same number of pairs. Otherwise the numbers
            are all-gathered, which synchronises a CUDA device.

    Raises:
        UserError: on all ranks, if one of them has no pairs.
    """
    if not is_active():
        return BatchLayout((local,), 0)
    if equal:
        return BatchLayout((local,) * world_size(), rank())
    sizes = torch.empty(world_size(), dtype=torch.int64, device=_message_device())
    _all_gather(sizes, torch.tensor([local], device=sizes.device))
    layout = BatchLayout(tuple(int(size) for size in sizes.tolist()), rank())
    if 0 in layout.sizes:
        raise UserError(
            f"the processes hold {list(layout.sizes)} pairs of this batch: each needs at least one"
        )
    return layout


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward: the exact gradient of the gather."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        local: Tensor,
        layout: BatchLayout,
    ) -> Tensor:
        ctx.layout = layout
        return gather_constant(local, layout)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return scatter_sum(grads[0], ctx.layout), None


def gather(local: Tensor, layout: BatchLayout | None = None) -> Tensor:
    """Concatenates the ranks' tensors along the first axis; gradients flow back to every rank.

    The backward pass sums the ranks' gradients. With losses that are `BatchLayout.mean`s of local
    anchors and gradients averaged over ranks (as DDP does), the result is the gradient of the
    global mean.

    Args:
        local: this rank's tensor.
        layout: lengths of the ranks' tensors; none: all equal.
    """
    if not is_active():
        return local
    layout = layout or layout_of(len(local), equal=True)
    return _Gather.apply(local, layout)  # pyright: ignore[reportReturnType]


def gather_constant(local: Tensor, layout: BatchLayout | None = None) -> Tensor:
    """Concatenates the ranks' tensors along the first axis, without gradient.

    Args:
        local: this rank's tensor.
        layout: lengths of the ranks' tensors; none: all equal.
    """
    if not is_active():
        return local.detach()
    layout = layout or layout_of(len(local), equal=True)
    padded = _padded(layout, local.detach())
    gathered = padded.new_empty((len(padded) * world_size(), *padded.shape[1:]))
    _all_gather(gathered, padded)
    return _unpadded(layout, gathered)


def scatter_sum(full: Tensor, layout: BatchLayout) -> Tensor:
    """This rank's rows of the sum of the ranks' tensors (reduce-scatter along the first axis)."""
    if not is_active():
        return full
    padded = _padded_parts(layout, full)
    local = padded.new_empty((max(layout.sizes), *full.shape[1:]))
    _reduce_scatter(local, padded, op=dist.ReduceOp.SUM)
    return local[: layout.sizes[layout.rank]]


def logsumexp_over_ranks(value: Tensor, bound: Tensor) -> Tensor:
    """Elementwise log of the sum over ranks of exp(value), by one all-reduce.

    It sums exp(value - bound) in float64, whose exponents reach 700 below the bound (float32: 87).
    Two all-reduces in float32, of maxima and of sums, would send as many bytes.

    Args:
        value: logarithms.
        bound: equal on all ranks; at least the largest value, and less than 700 above it.
    """
    if not is_active():
        return value
    total = sum_over_ranks((value.double() - bound).exp_())
    return total.log_().add_(bound).to(value.dtype)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of the ranks' tensors, in place."""
    if is_active():
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of the ranks' tensors, in place."""
    if is_active():
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        value /= world_size()
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Elementwise maximum of the ranks' tensors, in place."""
    if is_active():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def owned_slice(size: int) -> Slice:
    """This rank's contiguous share of `size` items; the first ranks may hold one more."""
    share, extra = divmod(size, world_size())
    start = rank() * share + min(rank(), extra)
    return Slice(start, start + share + (rank() < extra))


def gather_slices(local: Tensor, size: int, axis: int) -> Tensor:
    """Concatenates the ranks' `owned_slice`s of an axis.

    Args:
        local: this rank's slice.
        size: length of the full axis.
        axis: the sharded axis of `local`.
    """
    if not is_active():
        return local
    largest = -(-size // world_size())
    padded_shape = list(local.shape)
    padded_shape[axis] = largest
    padded = local.new_zeros(padded_shape)
    padded.narrow(axis, 0, local.shape[axis]).copy_(local)
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    share, extra = divmod(size, world_size())
    return torch.cat(
        [part.narrow(axis, 0, share + (r < extra)) for r, part in enumerate(parts)], axis
    )


def barrier() -> None:
    """Waits for all ranks, without a time limit while all of them live."""
    if not is_active():
        return
    joined = process_group.joined()
    if joined is None:
        dist.barrier()
    else:
        joined.wait_for_all()


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in rank order; anything that can be pickled (tensors on the CPU)."""
    if not is_active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """The main process's value on all ranks; anything that can be pickled."""
    values = [value]
    if is_active():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def first_rank_with(value: T | None) -> tuple[int, T] | None:
    """The lowest rank with a value, and that value; none if no rank has one."""
    found = [(r, v) for r, v in enumerate(gather_objects(value)) if v is not None]
    return found[0] if found else None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if not is_active():
        return flag
    return bool(max_over_ranks(torch.tensor(int(flag), device=_message_device())).item())


def _message_device() -> str:
    """The device from which the backend sends tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def data_parallel(towers: nn.Module, device: torch.device) -> nn.Module:
    """Wraps the towers in DDP, which averages gradients over ranks.

    Returns the towers themselves for a single process, and if they are sharded: FSDP2 averages.
    """
    if not is_active() or isinstance(towers, FSDPModule):
        return towers
    # A 1 x 1 convolution in channels-last layout has two equal descriptions of its strides.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(towers, device_ids=device_ids)


def no_sync(towers: nn.Module) -> AbstractContextManager[None]:
    """Adds gradients locally in a `with` block; the first pass after it averages the sums.

    Has an effect on DDP towers only.
    """
    if isinstance(towers, nn.parallel.DistributedDataParallel):
        return towers.no_sync()
    return nullcontext()
