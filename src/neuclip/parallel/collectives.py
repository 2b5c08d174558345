"""Everything the project asks of torch.distributed; nothing else calls it.

With no process group, or with one process, every function here is the identity, so that callers
need no special case for world size 1. Global batches are the ranks' local batches in rank order.
"""

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
    """A collective under its newer name; older releases of torch know only the other."""
    return getattr(dist, new, None) or getattr(dist, old)


_all_gather = _renamed("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Slice:
    """The contiguous part [start, stop) of a global axis that this rank owns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def is_active() -> bool:
    """Whether more than one process takes part."""
    if _every_rank_alone:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Generator[None]:
    """Every rank by itself: inside, this process counts as the only one there is."""
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
    """This process's number, 0 for a single process."""
    return dist.get_rank() if is_active() else 0


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


@dataclass(frozen=True)
class BatchLayout:
    """How the pairs of a global batch lie over the ranks, in rank order.

    Attributes:
        sizes: the number of pairs each rank holds.
        rank: this process.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """Pairs of all ranks."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """Place of this rank's first pair in the global batch."""
        return sum(self.sizes[: self.rank])

    @property
    def even(self) -> bool:
        """Whether all ranks hold as many."""
        return len(set(self.sizes)) == 1

    def mean(self, values: Tensor) -> Tensor:
        """Mean over this rank's pairs (last axis), weighed so that ranks average to the global one.

        Gradients are averaged over ranks (as DDP does), so a rank that holds more pairs than
        others must count for more.
        """
        mean = values.mean(-1)
        if self.even:
            return mean
        return mean * (len(self.sizes) * self.sizes[self.rank] / self.total)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor over the global batch (axis 1)."""
        return whole.narrow(1, self.start, self.sizes[self.rank])


def _padded(layout: BatchLayout, local: Tensor) -> Tensor:
    """As long as the longest rank's tensor, for collectives want equal lengths."""
    if layout.even:
        return local.contiguous()
    padded = local.new_zeros((max(layout.sizes), *local.shape[1:]))
    padded[: len(local)] = local
    return padded


def _parts(layout: BatchLayout, whole: Tensor) -> Tensor:
    """The ranks' padded tensors, one after the other, without their padding."""
    if layout.even:
        return whole
    parts = zip(whole.split(max(layout.sizes)), layout.sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def _spread(layout: BatchLayout, whole: Tensor) -> Tensor:
    """The reverse of `_parts`."""
    if layout.even:
        return whole.contiguous()
    longest = max(layout.sizes)
    spread = whole.new_zeros((len(layout.sizes), longest, *whole.shape[1:]))
    for row, part in zip(spread, whole.split(layout.sizes), strict=True):
        row[: len(part)] = part
    return spread.flatten(0, 1)


def layout_of(local: int, *, equal: bool = False) -> BatchLayout:
    """How many pairs every rank holds.

    Args:
        local: this rank's number.
        equal: that all ranks hold as many is known: nothing is exchanged. Otherwise one integer
            is, and a CUDA device is waited for.

    Raises:
        UserError: on all ranks, if one of them has no pair.
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
    """All-gather forward, reduce-scatter (sum) backward: the exact gradient of a gather."""

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
        layout: the lengths of the ranks' tensors; none: all equal.
    """
    if not is_active():
        return local
    layout = layout or layout_of(len(local), equal=True)
    return _Gather.apply(local, layout)  # pyright: ignore[reportReturnType]


def gather_constant(local: Tensor, layout: BatchLayout | None = None) -> Tensor:
    """Concatenates the ranks' tensors along the first axis, without gradient.

    Args:
        local: this rank's tensor.
        layout: the lengths of the ranks' tensors; none: all equal.
    """
    if not is_active():
        return local.detach()
    layout = layout or layout_of(len(local), equal=True)
    padded = _padded(layout, local.detach())
    whole = padded.new_empty((len(padded) * world_size(), *padded.shape[1:]))
    _all_gather(whole, padded)
    return _parts(layout, whole)


def scatter_sum(whole: Tensor, layout: BatchLayout) -> Tensor:
    """This rank's part (first axis) of the sum of the ranks' tensors: the reverse of a gather."""
    if not is_active():
        return whole
    spread = _spread(layout, whole)
    local = spread.new_empty((max(layout.sizes), *whole.shape[1:]))
    _reduce_scatter(local, spread, op=dist.ReduceOp.SUM)
    return local[: layout.sizes[layout.rank]]


def logsumexp_over_ranks(value: Tensor, bound: Tensor) -> Tensor:
    """Logarithm of the sum of the ranks' exp(value), elementwise, by one all-reduce.

    The sum is taken of exp(value - bound) in float64, whose exponents reach 700 below the bound
    (float32's, 87); two all-reduces, of maxima and of sums, would carry as many bytes.

    Args:
        value: logarithms.
        bound: the same on all ranks, not below any value, and less than 700 above the largest.
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
    """This rank's contiguous share of `size` items; the first ranks may take one more."""
    share, extra = divmod(size, world_size())
    start = rank() * share + min(rank(), extra)
    return Slice(start, start + share + (rank() < extra))


def gather_slices(local: Tensor, size: int, axis: int) -> Tensor:
    """Rebuilds the whole axis of `size` items from the ranks' `owned_slice`s of it.

    Args:
        local: this rank's part.
        size: length of the whole axis.
        axis: which axis of `local` is shared out.
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
    """Waits for all ranks, without a limit as long as all of them live."""
    if not is_active():
        return
    joined = process_group.joined()
    if joined is None:
        dist.barrier()
    else:
        joined.wait_for_all()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, anything that can be pickled (tensors on the CPU), in rank order."""
    if not is_active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """The main process's value, anything that can be pickled, on all ranks."""
    values = [value]
    if is_active():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def first_of(value: T | None) -> tuple[int, T] | None:
    """The lowest rank that has a value, with it; none if no rank has one."""
    found = [(r, v) for r, v in enumerate(gather_objects(value)) if v is not None]
    return found[0] if found else None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if not is_active():
        return flag
    return bool(max_over_ranks(torch.tensor(int(flag), device=_message_device())).item())


def _message_device() -> str:
    """Where a number must lie for the backend to send it."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def data_parallel(towers: nn.Module, device: torch.device) -> nn.Module:
    """The towers with gradients averaged over ranks (DDP).

    Unchanged for a single process, and when they are sharded: then they average them themselves.
    """
    if not is_active() or isinstance(towers, FSDPModule):
        return towers
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(towers, device_ids=device_ids)


def no_sync(towers: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward passes in a `with` block add to this rank's gradients only.

    The first pass outside averages the sums. For towers of one process there is nothing to hold.
    """
    if isinstance(towers, nn.parallel.DistributedDataParallel):
        return towers.no_sync()
    return nullcontext()
