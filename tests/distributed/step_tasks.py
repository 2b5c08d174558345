"""Training steps as every rank does them; imported by the processes of the pool."""

from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip import distributed
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
    towers = distributed.parallel(bench.towers, CPU)
    step = TrainingStep(bench.clip, towers, bench.loss, bench.optimizer, CPU)
    losses = []
    for number in range(3):
        whole = batch(number)
        share = len(whole) // distributed.world_size()
        own = rows(whole, distributed.rank() * share, (distributed.rank() + 1) * share)
        losses.append(step(split(own, size)).loss)
    return Steps(losses, bench.optimizer.kept, bench.towers.state_dict())
