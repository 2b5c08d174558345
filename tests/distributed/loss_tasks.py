"""The tasks of each rank; imported by the processes of the pool."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.registry import method_settings
from neuclip.errors import UserError
from neuclip.method.arithmetic import Arithmetic
from neuclip.method.losses import pair_loss, sigmoid
from neuclip.method.losses.sigmoid import SigmoidLoss
from neuclip.method.notation import Pairs
from neuclip.method.softmax.candidates import Candidates
from neuclip.parallel import collectives

SAMPLES = 30
BATCH = 12
DIM = 5

EVEN = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
UNEVEN = {1: (12,), 2: (9, 3), 3: (5, 1, 6), 4: (2, 5, 1, 4)}


@dataclass(frozen=True)
class Task:
    """A loss, and the numbers of the global batches it is to see.

    Attributes:
        name: the method.
        settings: its settings.
        steps: batches; ranks hold different numbers of pairs of the odd ones.
        other_form: gradients of features travel the way this method does not take by itself.
        sharded: whether ranks keep shards of the prototypes.
        drop_in: whether the loss is created from the width of the embeddings alone.
        options: whether batches bring groups, pair weights and hard negatives.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (0, 1, 2, 3)
    other_form: bool = False
    sharded: bool = True
    drop_in: bool = False
    options: bool = False


def global_batch(number: int) -> tuple[Tensor, Tensor]:
    """Features [2, BATCH, DIM] and ids; odd batches hold one id twice."""
    generator = torch.Generator().manual_seed(number)
    features = torch.randn(2, BATCH, DIM, generator=generator, dtype=torch.float64)
    features[1] += features[0]
    ids = torch.randperm(SAMPLES // 2, generator=generator)[:BATCH]
    if number % 2:
        ids[-1] = ids[0]
    return functional.normalize(features, dim=-1), ids


def options_of(number: int, batch: int = BATCH, dim: int = DIM) -> dict[str, Tensor]:
    """What a global batch brings beside its pairs; in batch 2 the last pair has no negative."""
    generator = torch.Generator().manual_seed(50 + number)
    groups = torch.randint(0, 4, (batch, 2), generator=generator)
    if number == 2:
        groups[:, 0], groups[-1, 0] = 7, 7
        groups[0] = 0
        groups[0, 1] = groups[-1, 1] = 9
    hard = functional.normalize(torch.randn(batch, dim, generator=generator).double(), dim=-1)
    hard[torch.rand(batch, generator=generator) < 0.3] = 0
    weights = torch.rand(batch, generator=generator).double()
    weights[3] = 0
    return {"groups": groups, "pair_weights": weights, "negative_features": hard}


@dataclass(frozen=True)
class Result:
    """A rank's results: loss and gradients per step, and the state at the end."""

    losses: list[Tensor]
    feature_grads: list[Tensor]
    scale_grads: list[Tensor]
    bias_grads: list[Tensor]
    predicted: Tensor | None
    metrics: dict[str, float]
    state: dict[str, Any]


def build(task: Task) -> torch.nn.Module:
    """The loss in float64."""
    if task.drop_in:
        return create_loss(task.name, embed_dim=DIM, **task.settings).double()
    settings = method_settings(task.name, task.settings)
    run = RunFacts(DIM, steps_per_epoch=2, num_samples=SAMPLES, sharded=task.sharded)
    return build_loss(settings, run).double()


def local_slice(number: int) -> slice:
    """This rank's pairs of a global batch."""
    sizes = (UNEVEN if number % 2 else EVEN)[collectives.world_size()]
    start = sum(sizes[: collectives.rank()])
    return slice(start, start + sizes[collectives.rank()])


def gathered_log_inner(
    features: Tensor, logit_scale: Tensor, candidates: Candidates, _: Arithmetic
) -> tuple[Tensor, Tensor | None]:
    """`log_inner` by a gather with gradients (reduce-scatter backward) and the whole matrix."""
    layout = candidates.layout
    whole = collectives.gather(features.transpose(0, 1).contiguous(), layout).transpose(0, 1)
    local = features.shape[1]
    own = torch.zeros(local, layout.total, dtype=torch.bool)
    own.diagonal(layout.start)[:local] = True
    values, slopes = [], []
    for side, scale in enumerate(logit_scale.expand(2, local)):
        similarity = features[side] @ whole[1 - side].T
        logits = (similarity * scale[:, None]).masked_fill(own, -math.inf)
        positive = similarity[own]
        values.append(logits.logsumexp(1) - positive * scale - math.log(layout.total - 1))
        slopes.append((logits.softmax(1) * similarity).sum(1) - positive)
    return torch.stack(values), torch.stack(slopes).detach() if logit_scale.ndim else None


def two_term_sigmoid(
    self: SigmoidLoss, pairs: Pairs, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """SigLIP's loss in FastCLIP's form: every side once with gradient, against constants."""
    image, text = pairs.features
    everybody = collectives.gather_constant(pairs.features.transpose(0, 1), pairs.layout)
    apply, start = sigmoid._PairwiseSigmoid.apply, pairs.layout.start
    value = apply(image, everybody[:, 1], logit_scale, logit_bias, start)
    mirror = apply(text, everybody[:, 0], logit_scale.detach(), logit_bias.detach(), start)
    return pairs.layout.mean((value + mirror - mirror.detach())[None])


@contextmanager
def form_of(task: Task) -> Iterator[None]:
    """Inside, softmax losses gather constants and the sigmoid loss gradients; or the reverse."""
    kept = pair_loss.log_inner, SigmoidLoss.pair_loss
    if task.other_form:
        pair_loss.log_inner, SigmoidLoss.pair_loss = gathered_log_inner, two_term_sigmoid
    try:
        yield
    finally:
        pair_loss.log_inner, SigmoidLoss.pair_loss = kept


def train(task: Task, state: dict[str, Any] | None = None) -> Result:
    """Trains on this rank's share of each batch."""
    torch.set_num_threads(1)
    with form_of(task):
        return _train(task, state)


def _train(task: Task, state: dict[str, Any] | None) -> Result:
    loss = build(task)
    if state is not None:
        loss.load_state_dict(state)
    losses, feature_grads, scale_grads, bias_grads = [], [], [], []
    for number in task.steps:
        features, ids = global_batch(number)
        own = local_slice(number)
        leaf = features[:, own].clone().requires_grad_()
        scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
        options = {}
        if task.options:
            options = {name: each[own] for name, each in options_of(number).items()}
            options["negative_features"].requires_grad_()
        given = {"sample_ids": ids[own], **options, **keys_for(loss, leaf)}
        value = loss(leaf[0], leaf[1], scale, bias, **given)
        value.backward()
        losses.append(value.detach())
        hard = options.get("negative_features")
        feature_grads.append(leaf.grad if hard is None else torch.cat([leaf.grad, hard.grad[None]]))
        scale_grads.append(torch.zeros(()).double() if scale.grad is None else scale.grad)
        bias_grads.append(torch.zeros(()).double() if bias.grad is None else bias.grad)
    predicted = None
    if loss.predicts_log_normalizers:
        predicted = loss.predict_log_normalizers(
            leaf[0].detach(), leaf[1].detach(), scale.detach(), ids[own]
        )
    return Result(
        losses,
        feature_grads,
        scale_grads,
        bias_grads,
        predicted,
        loss.metrics(),
        loss.state_dict(),
    )


def every_collective() -> dict[str, Any]:
    """Every helper of `neuclip.parallel.collectives`, on a tensor that tells the rank."""
    rank, size = collectives.rank(), collectives.world_size()
    local = torch.full((2, 3), float(rank), dtype=torch.float64, requires_grad=True)
    whole = collectives.gather(local)
    weights = torch.arange(whole.numel(), dtype=torch.float64).view_as(whole) * (rank + 1)
    (grad,) = torch.autograd.grad((whole * weights).sum(), local)
    sizes = tuple(range(1, size + 1))  # rank r holds r + 1 rows
    uneven = torch.full((rank + 1, 2), float(rank), dtype=torch.float64, requires_grad=True)
    layout = collectives.layout_of(rank + 1)
    whole_uneven = collectives.gather(uneven, layout)
    weights = torch.arange(whole_uneven.numel(), dtype=torch.float64).view_as(whole_uneven)
    held = whole_uneven.detach()[layout.start :][: rank + 1, 0]
    (uneven_grad,) = torch.autograd.grad((whole_uneven * weights * (rank + 1)).sum(), uneven)
    seven = torch.arange(7.0).view(1, 7)
    owned = collectives.owned_slice(7)
    return {
        "rank": rank,
        "gather": whole.detach(),
        "grad": grad,
        "layout": (layout.sizes == sizes, layout.start, layout.total),
        "uneven": whole_uneven.detach(),
        "uneven_grad": uneven_grad,
        "weighed": collectives.mean_over_ranks(layout.mean(held)),
        "logsumexp": collectives.logsumexp_over_ranks(
            torch.tensor([-90.0 * rank, 90.0 + rank]), torch.tensor(100.0)
        ),
        "constant": collectives.gather_constant(torch.tensor([rank, -rank])),
        "sum": collectives.sum_over_ranks(torch.tensor([1.0 + rank])),
        "mean": collectives.mean_over_ranks(torch.tensor([1.0 + rank])),
        "max": collectives.max_over_ranks(torch.tensor([1.0 + rank])),
        "slice": (owned.start, owned.stop, len(owned)),
        "slices": collectives.gather_slices(seven[:, owned.start : owned.stop], 7, axis=1),
        "any": (collectives.any_rank(rank == size - 1), collectives.any_rank(False)),
        "main": collectives.is_main(),
    }


def too_few_prototypes() -> str:
    """The message for more processes than prototypes."""
    settings = {"gamma": 0.5, "gamma_schedule": "constant", "num_prototypes": 1}
    try:
        create_loss("neuclip", embed_dim=4, steps_per_epoch=1, **settings)
    except UserError as error:
        return str(error)
    return ""


def different_numbers(equal: bool, sizes: tuple[int, ...]) -> str:
    """The error of a loss for ranks with the given numbers of pairs, or an empty string."""
    loss = create_loss("openclip", embed_dim=DIM)
    loss.attach(equal_batches=equal)
    features = global_batch(0)[0][:, : sizes[collectives.rank()]]
    try:
        loss(features[0], features[1], torch.tensor(3.0).double())
    except UserError as error:
        return str(error)
    return ""
