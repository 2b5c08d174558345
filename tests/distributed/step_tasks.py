"""Training steps as every rank does them; imported by the processes of the pool."""

from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.parallel import collectives
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from step_parts import CPU, Bench, batch, rows, split


@dataclass(frozen=True)
class Steps:
    """What a rank saw."""

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


def one_rank_meets_infinity(method: str) -> tuple[list[str | None], bool, bool]:
    """The problems of two steps, the first with a bad picture on the last rank; and the weights.

    Returns:
        The problems; whether the first step left the weights alone; whether rank 0's call to stop
        was heard.
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
    verdicts = [step([first]).readback.read()]
    same = all(torch.equal(v, before[name]) for name, v in bench.towers.state_dict().items())
    asked = collectives.rank() == 0
    verdicts.append(step([rows(batch(7), 0, 6)], stop_asked=asked).readback.read())
    return [verdict.problem for verdict in verdicts], same, verdicts[1].stop
