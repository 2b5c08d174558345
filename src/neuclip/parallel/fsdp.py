"""FSDP2: towers whose parameters, gradients and optimiser are shared out over the processes.

A parameter is then a DTensor, of which a process holds one part, and is gathered for the forward
and the backward pass of its unit only. What is not sharded stays a plain tensor, equal on all
processes: the scalars `logit_scale` and `logit_bias` (FSDP2 shards no scalars, and their logarithms
would suffer from bfloat16), and the buffers.
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
"""Methods of the towers that are called besides `forward`."""


@contextmanager
def ensure_process_group(device_type: str, *, wanted: bool) -> Generator[None]:
    """A process group for the duration of a `with` block, also for a single process.

    FSDP2 and the sharded checkpoints need one; it changes nothing for a single process elsewhere.

    Args:
        device_type: `cuda` selects NCCL, anything else gloo.
        wanted: whether anything is to be sharded.
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
    """A group of all ranks on the CPU, for a thread that must not meet the training's collectives.

    All ranks call this together.
    """
    made = dist.new_group(backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    return made


def shard(
    towers: nn.Module, units: Sequence[nn.Module], device: torch.device, *, low_precision: bool
) -> None:
    """Shards the towers in place: each unit on its own, and what is left with the root.

    Gradients are averaged over the processes in float32, as DDP averages them.

    Args:
        towers: the model, equal on all processes.
        units: its blocks, each gathered as a whole.
        device: where the parameters live.
        low_precision: gather and compute with bfloat16 parameters; updates stay in float32. A unit
            with BatchNorm stays in float32, which its running statistics need.
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


def _policy(unit: nn.Module, low_precision: bool) -> MixedPrecisionPolicy:
    if not low_precision or _statistics(unit):
        return MixedPrecisionPolicy(reduce_dtype=torch.float32 if low_precision else None)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


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
    """Before each forward pass, as DDP does: the first process's statistics are everybody's."""
    if towers.training:
        share_statistics(towers)


def share_statistics(towers: nn.Module) -> None:
    """Gives every process the BatchNorm statistics of the first, which are those that are saved."""
    buffers = _statistics(towers)
    if not (buffers and collectives.is_active()):
        return
    whole = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(whole, src=0)
    for buffer, part in zip(buffers, whole.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def units_of(towers: nn.Module) -> list[FSDPModule]:
    """The sharded units of the towers, the root first; none if they are not sharded."""
    return [module for module in towers.modules() if isinstance(module, FSDPModule)]


def is_sharded(towers: nn.Module) -> bool:
    """Whether the towers are shared out over the processes."""
    return isinstance(towers, FSDPModule)


@contextmanager
def gathered(towers: nn.Module) -> Generator[None]:
    """Towers whole and equal on every process within a `with` block, to be judged.

    All processes enter together. Inside, forward passes need no other process, so that each may
    take as many as it likes; nothing may be trained. Towers that are not sharded only get the
    first process's BatchNorm statistics.
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
            # FSDP2's own choice: the root, whose backward pass comes at once, is kept.
            unit.set_reshard_after_forward(number > 0, recurse=False)
            unit.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, live: Tensor) -> Tensor:
    """A whole tensor cut as `live` is; no process asks another, each takes its own part."""
    if not isinstance(live, DTensor) or isinstance(value, DTensor):
        return value
    placed = value.to(live.device)
    return distribute_tensor(placed, live.device_mesh, live.placements, src_data_rank=None)


def local_shard(parameter: nn.Parameter) -> nn.Parameter:
    """This process's part as a parameter of its own, sharing memory; a plain parameter itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.to_local().detach())


def from_local(own: Tensor, live: Tensor) -> Tensor:
    """The tensor of which `own` is this process's part, cut as `live` is."""
    if not isinstance(live, DTensor):
        return own
    return DTensor.from_local(
        own,
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=live.shape,
        stride=live.stride(),
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process; all call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The sharded and the plain tensors apart, for operations that take no mixture."""
    sharded, plain = list[Tensor](), list[Tensor]()
    for tensor in tensors:
        (sharded if isinstance(tensor, DTensor) else plain).append(tensor)
    return [kind for kind in (sharded, plain) if kind]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all elements of all tensors, over all processes."""
    norms = [full_tensor(nn.utils.get_total_norm(kind, foreach=True)) for kind in by_kind(tensors)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients down to a total norm of `limit`; returns the norm before."""
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    for kind in by_kind(parameters):
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm
