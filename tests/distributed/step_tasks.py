"""Training steps of a rank, for the processes of the pool."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuclip import create_loss
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.model.lora import add_updates
from neuclip.parallel import collectives
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from neuclip.training.teacher import Teacher
from step_parts import CPU, DIM, SAMPLES, Bench, batch, rows, split
from tiny_models import pairs, tiny


@dataclass(frozen=True)
class Steps:
    """The results of a rank."""

    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def train_in_micro_batches(method: str, size: int) -> Steps:
    """Three steps on this rank's share of each batch, in micro-batches of a size."""
    torch.set_num_threads(1)
    bench = Bench.of(method, noisy=False)
    towers = collectives.data_parallel(bench.towers, CPU)
    step = TrainingStep(bench.clip, towers, bench.loss, bench.optimizer, CPU)
    losses = []
    for number in range(3):
        whole = batch(number)
        share = len(whole) // collectives.world_size()
        own = rows(whole, collectives.rank() * share, (collectives.rank() + 1) * share)
        losses.append(step(split(own, size)).loss)
    return Steps(losses, bench.optimizer.kept, bench.towers.state_dict())


def distill_in_micro_batches(size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Three steps with a teacher; the distillation of each on this rank, and the weights."""
    torch.set_num_threads(1)
    bench, other = Bench.of("openclip", noisy=False), Bench.of("openclip", noisy=False)
    with torch.no_grad():
        for parameter in other.towers.parameters():
            parameter.mul_(1.5).requires_grad_(False)
    teacher = Teacher(other.clip, 2.0, "")
    towers = collectives.data_parallel(bench.towers, CPU)
    step = TrainingStep(bench.clip, towers, bench.loss, bench.optimizer, CPU, teacher=teacher)
    found = []
    for number in range(3):
        whole = batch(number)
        share = len(whole) // collectives.world_size()
        first = collectives.rank() * share
        result = step(split(rows(whole, first, first + share), size))
        assert result.distilled is not None
        found.append(result.distilled)
    return found, bench.towers.state_dict()


def train_low_rank_updates(size: int) -> dict[str, Tensor]:
    """Two steps of LoRA on this rank's share of each batch, in micro-batches; all weights."""
    torch.set_num_threads(1)
    clip = tiny(seed=7)
    towers = clip.towers.double()
    towers.visual.register_forward_pre_hook(lambda _, images: (images[0].double(),))
    add_updates(towers, AdaptationConfig(lora_rank=2), 0)
    settings = resolve(RunConfig(), 1).optim.model_copy(update={"lr": 0.01, "warmup": 1})
    optimizer = Optimizer(towers, settings, 10)
    optimizer.set_rates(1)
    loss = create_loss("neuclip_pool", embed_dim=clip.embed_dim, num_samples=SAMPLES, pool_size=24)
    parallel = collectives.data_parallel(towers, CPU)
    step = TrainingStep(clip, parallel, loss.double(), optimizer, CPU)
    for number in range(2):
        images, tokens = pairs(12, number)
        whole = replace(batch(number), images=images, tokens=tokens)
        share = len(whole) // collectives.world_size()
        first = collectives.rank() * share
        step(split(rows(whole, first, first + share), size))
    return towers.state_dict()


def infinity_on_one_rank(method: str) -> tuple[list[str | None], bool, bool]:
    """Runs two steps, the first with a non-finite image on the last rank.

    Returns:
        The problems of both steps, whether the first left the weights unchanged, and whether the
        status of the second has rank 0's stop request.
    """
    torch.set_num_threads(1)
    bench = Bench.of(method, noisy=False)
    optimizer = Optimizer(bench.towers, resolve(RunConfig(), 1).optim, 10)
    optimizer.set_rates(0)
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    towers = collectives.data_parallel(bench.towers, CPU)
    step = TrainingStep(bench.clip, towers, bench.loss, optimizer, CPU)
    first = rows(batch(collectives.rank()), 0, 6)
    if collectives.rank() == collectives.world_size() - 1:
        first.images[2] = torch.inf
    statuses = [step([first]).readback.read()]
    same = all(torch.equal(v, before[name]) for name, v in bench.towers.state_dict().items())
    asked = collectives.rank() == 0
    statuses.append(step([rows(batch(7), 0, 6)], stop_asked=asked).readback.read())
    return [status.problem for status in statuses], same, statuses[1].stop


def settle(method: str, size: int) -> tuple[Tensor, Tensor]:
    """A warm start on this rank's share of three batches, with a rho that is measured.

    Returns:
        Rho, and the first moment of a weight.
    """
    torch.set_num_threads(1)
    bench = Bench.of(method, noisy=False)
    loss = create_loss(method, embed_dim=DIM, num_samples=SAMPLES, rho="auto").double()
    optimizer = Optimizer(bench.towers, resolve(RunConfig(), 1).optim, 10)
    towers = collectives.data_parallel(bench.towers, CPU)
    step = TrainingStep(bench.clip, towers, loss, optimizer, CPU)
    with step.settling():
        for number in range(3):
            whole = batch(number)
            share = len(whole) // collectives.world_size()
            first = collectives.rank() * share
            step(split(rows(whole, first, first + share), size))
    moment = optimizer.inner.state[bench.towers.head.weight]["exp_avg"]
    return loss.measured_rho.value, moment
