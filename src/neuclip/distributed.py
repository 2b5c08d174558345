"""Everything the project asks of torch.distributed; nothing else calls it.

With no process group, or with one process, every function here is the identity, so that callers
need no special case for world size 1. Global batches are the ranks' local batches in rank order.
"""

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuclip.errors import UserError


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
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
class Launch:
    """What the launcher (torchrun, or Slurm's srun) told this process."""

    rank: int
    world_size: int
    local_rank: int


def launch_environment() -> Launch:
    """Reads the launcher's variables; a process started by hand is rank 0 of 1.

    Raises:
        UserError: a variable is missing or is no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    elif "WORLD_SIZE" not in os.environ:
        return Launch(0, 1, 0)
    try:
        values = [int(os.environ[name]) for name in names]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete: {', '.join(names)} must all be numbers "
            f"({error})"
        ) from None
    return Launch(*values)


@contextmanager
def process_group(device_type: str) -> Generator[Launch]:
    """Joins the processes that the launcher started, for the duration of a `with` block.

    Args:
        device_type: `cuda` selects NCCL, anything else gloo.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT is missing.
    """
    launch = launch_environment()
    if launch.world_size == 1 or dist.is_initialized():
        yield launch
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{launch.world_size} processes were started, but {' and '.join(missing)} is not set; "
            "torchrun sets it, under srun export it in the job script"
        )
    if device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", rank=launch.rank, world_size=launch.world_size
    )
    try:
        yield launch
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward: the exact gradient of a gather."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        return gather_constant(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (grad,) = grads
        local = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        _reduce_scatter(local, grad.contiguous(), op=dist.ReduceOp.SUM)
        return local


def gather(local: Tensor) -> Tensor:
    """Concatenates the ranks' tensors along the first axis; gradients flow back to every rank.

    The backward pass sums the ranks' gradients. With losses that are means over *local* anchors and
    gradients averaged over ranks (as DDP does), the result is the gradient of the global mean.
    """
    return _Gather.apply(local) if is_active() else local  # pyright: ignore[reportReturnType]


def gather_constant(local: Tensor) -> Tensor:
    """Concatenates the ranks' tensors along the first axis, without gradient."""
    if not is_active():
        return local.detach()
    whole = local.new_empty((local.shape[0] * world_size(), *local.shape[1:]))
    _all_gather(whole, local.detach().contiguous())
    return whole


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
    """Waits for all ranks."""
    if is_active():
        dist.barrier()


def gather_integers(value: int) -> list[int]:
    """Every rank's integer, of any size, in rank order."""
    if not is_active():
        return [value]
    values: list[int] = [0] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if not is_active():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(max_over_ranks(torch.tensor(int(flag), device=device)).item())


def parallel(towers: nn.Module, device: torch.device) -> nn.Module:
    """The towers with gradients averaged over ranks (DDP); unchanged for a single process."""
    if not is_active():
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
