"""What every rank does; imported by the processes of the pool."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neuclip import create_loss, distributed

SAMPLES = 30
BATCH = 6
DIM = 5


@dataclass(frozen=True)
class Task:
    """A loss, and the numbers of the global batches it is to see."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (0, 1, 2, 3)


def global_batch(number: int) -> tuple[Tensor, Tensor]:
    """Features [2, BATCH, DIM] and ids; odd batches hold one id twice."""
    generator = torch.Generator().manual_seed(number)
    features = torch.randn(2, BATCH, DIM, generator=generator, dtype=torch.float64)
    features[1] += features[0]
    ids = torch.randperm(SAMPLES // 2, generator=generator)[:BATCH]
    if number % 2:
        ids[-1] = ids[0]
    return functional.normalize(features, dim=-1), ids


@dataclass(frozen=True)
class Result:
    """What a rank saw: per step its loss and gradients; afterwards the state."""

    losses: list[Tensor]
    feature_grads: list[Tensor]
    scale_grads: list[Tensor]
    bias_grads: list[Tensor]
    predicted: Tensor | None
    metrics: dict[str, float]
    state: dict[str, Any]


def build(task: Task) -> torch.nn.Module:
    """The loss in float64."""
    return create_loss(
        task.name, embed_dim=DIM, steps_per_epoch=2, num_samples=SAMPLES, **task.settings
    ).double()


def train(task: Task, state: dict[str, Any] | None = None) -> Result:
    """Steps through the batches, with this rank's share of each."""
    torch.set_num_threads(1)
    loss = build(task)
    if state is not None:
        loss.load_state_dict(state)
    share = BATCH // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    losses, feature_grads, scale_grads, bias_grads = [], [], [], []
    for number in task.steps:
        features, ids = global_batch(number)
        leaf = features[:, own].clone().requires_grad_()
        scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
        value = loss(leaf[0], leaf[1], scale, bias, sample_ids=ids[own])
        value.backward()
        losses.append(value.detach())
        feature_grads.append(leaf.grad)
        scale_grads.append(torch.zeros(()).double() if scale.grad is None else scale.grad)
        bias_grads.append(torch.zeros(()).double() if bias.grad is None else bias.grad)
    predicted = None
    if task.name != "siglip":
        normalizers = loss.predict_log_normalizers(
            leaf[0].detach(), leaf[1].detach(), scale.detach(), ids[own]
        )
        predicted = torch.stack([normalizers.image, normalizers.text])
    return Result(
        losses,
        feature_grads,
        scale_grads,
        bias_grads,
        predicted,
        loss.metrics(),
        loss.state_dict(),
    )


def collectives() -> dict[str, Any]:
    """Every helper of `neuclip.distributed`, on a tensor that tells the rank."""
    rank, size = distributed.rank(), distributed.world_size()
    local = torch.full((2, 3), float(rank), dtype=torch.float64, requires_grad=True)
    whole = distributed.gather(local)
    weights = torch.arange(whole.numel(), dtype=torch.float64).view_as(whole) * (rank + 1)
    (grad,) = torch.autograd.grad((whole * weights).sum(), local)
    seven = torch.arange(7.0).view(1, 7)
    owned = distributed.owned_slice(7)
    return {
        "rank": rank,
        "gather": whole.detach(),
        "grad": grad,
        "constant": distributed.gather_constant(torch.tensor([rank, -rank])),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0 + rank])),
        "mean": distributed.mean_over_ranks(torch.tensor([1.0 + rank])),
        "max": distributed.max_over_ranks(torch.tensor([1.0 + rank])),
        "slice": (owned.start, owned.stop, len(owned)),
        "slices": distributed.gather_slices(seven[:, owned.start : owned.stop], 7, axis=1),
        "any": (distributed.any_rank(rank == size - 1), distributed.any_rank(False)),
        "main": distributed.is_main(),
    }


def too_few_prototypes() -> str:
    """The message for more processes than prototypes."""
    settings = {"gamma": 0.5, "gamma_schedule": "constant", "num_prototypes": 1}
    try:
        create_loss("neuclip", embed_dim=4, steps_per_epoch=1, **settings)
    except ValueError as error:
        return str(error)
    return ""
