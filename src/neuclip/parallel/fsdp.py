"""FSDP2: shards the towers' parameters, gradients and optimiser state over the ranks.

A sharded parameter is a DTensor. Each rank holds one shard of it, and all-gathers the full
parameter only for the forward and backward pass of its unit. The scalars `logit_scale` and
`logit_bias` and all buffers stay plain tensors, equal on all ranks: FSDP2 cannot shard scalars, and
a logarithm would lose precision in bfloat16.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from neuclip.parallel import collectives

ENTRANCES = ("encode_image", "encode_text")
"""Methods of the towers called besides `forward`."""


@contextmanager
def ensure_process_group(device_type: str, *, wanted: bool) -> Generator[None]:
    """Opens a process group of one for a single process, which FSDP2 needs too.

    Does nothing if a group exists.

    Args:
        device_type: `cuda` selects NCCL, anything else gloo.
        wanted: whether the towers will be sharded.
    """
    if not wanted or dist.is_initialized():
        yield
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def background_group() -> dist.ProcessGroup:
    """Makes a gloo group of all ranks for a thread beside the training's collectives.

    All ranks call this together.
    """
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def shard(
    towers: nn.Module,
    units: Sequence[nn.Module],
    device: torch.device,
    *,
    low_precision: torch.dtype | None,
) -> None:
    """Shards the towers in place: each unit by itself, and the remaining parameters with the root.

    Gradients are averaged over ranks in float32, as DDP averages them.

    Args:
        towers: the model, equal on all ranks.
        units: its blocks; the parameters of a unit are all-gathered together.
        device: of the parameters.
        low_precision: gather and compute with parameters of this type, and update in float32; none:
            float32 everywhere. Units with BatchNorm stay in float32 for their running statistics.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {p for p in towers.parameters() if p.ndim == 0}
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=_policy(unit, low_precision))
    fully_shard(towers, mesh=mesh, mp_policy=_policy(towers, low_precision), ignored_params=scalars)
    for name in ENTRANCES:
        register_fsdp_forward_method(towers, name)
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    if collectives.is_active() and _statistics(towers):
        towers.register_forward_pre_hook(_share_statistics_in_training)


def _policy(unit: nn.Module, low_precision: torch.dtype | None) -> MixedPrecisionPolicy:
    if low_precision is None:
        return MixedPrecisionPolicy()
    if _statistics(unit):
        return MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return MixedPrecisionPolicy(param_dtype=low_precision, reduce_dtype=torch.float32)


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    collectives.mean_over_ranks(parameter.grad)


def _statistics(towers: nn.Module) -> list[Tensor]:
    """The running means and variances of BatchNorm."""
    return [
        buffer
        for module in towers.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


def _share_statistics_in_training(towers: nn.Module, inputs: object) -> None:
    """Broadcasts rank 0's statistics before each forward pass, as DDP does."""
    if towers.training:
        share_statistics(towers)


def share_statistics(towers: nn.Module) -> None:
    """Broadcasts rank 0's BatchNorm statistics, the ones that checkpoints hold."""
    buffers = _statistics(towers)
    if not (buffers and collectives.is_active()):
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, src=0)
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def units_of(towers: nn.Module) -> list[FSDPModule]:
    """The sharded units of the towers, the root first; empty if the towers are not sharded."""
    return [module for module in towers.modules() if isinstance(module, FSDPModule)]


def is_sharded(towers: nn.Module) -> bool:
    """Whether the towers are sharded over the ranks."""
    return isinstance(towers, FSDPModule)


def reshard(towers: nn.Module) -> None:
    """Frees the full parameters of sharded towers, so that the next pass gathers the shards again.

    FSDP2 keeps those of the root after a forward pass, for a backward pass that may not follow.
    """
    for unit in units_of(towers):
        unit.reshard()


@contextmanager
def gathered(towers: nn.Module) -> Generator[None]:
    """Keeps the full towers on every rank within a `with` block, for evaluation.

    All ranks enter together. Inside, forward passes do not communicate, so ranks may run different
    numbers of them; training is not allowed. Unsharded towers only get rank 0's BatchNorm
    statistics.
    """
    share_statistics(towers)
    units = units_of(towers)
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for number, unit in enumerate(units):
            # FSDP2's default: the root stays gathered, since its backward pass follows at once.
            unit.set_reshard_after_forward(number > 0, recurse=False)
            unit.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor, sharing its memory; a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, live: Tensor) -> Tensor:
    """Shards a full tensor as `live` is sharded; each rank cuts out its own shard locally."""
    if not isinstance(live, DTensor) or isinstance(value, DTensor):
        return value
    placed = value.to(live.device)
    return distribute_tensor(placed, live.device_mesh, live.placements, src_data_rank=None)


def local_shard(parameter: nn.Parameter) -> nn.Parameter:
    """The local shard as a separate parameter, sharing memory; a plain parameter unchanged."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.to_local().detach())


def from_local(local: Tensor, live: Tensor) -> Tensor:
    """The DTensor whose local shard is `local`, sharded as `live`; a plain tensor unchanged."""
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local,
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=live.shape,
        stride=live.stride(),
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on every rank; all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Splits tensors into sharded and plain ones, for operations that cannot mix them."""
    sharded, plain = list[Tensor](), list[Tensor]()
    for tensor in tensors:
        (sharded if isinstance(tensor, DTensor) else plain).append(tensor)
    return [kind for kind in (sharded, plain) if kind]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm over all elements of all tensors, over all ranks."""
    norms = [full_tensor(nn.utils.get_total_norm(kind, foreach=True)) for kind in by_kind(tensors)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients down to a total norm of `limit`; returns the norm before scaling."""
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    for kind in by_kind(parameters):
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm
