"""Steps of small towers with a token head, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip import create_loss
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.method.losses.token_supervision import TokenHead
from neuclip.model.clip import Clip
from neuclip.parallel import collectives
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from neuclip.training.token_supervision import TokenSupervision
from tiny_models import CPU, pairs, tiny

WEIGHT = 0.7


def pairs_of(number: int, first: int = 0, last: int = 12) -> Batch:
    """Pairs of a global batch of 12."""
    images, tokens = (each[first:last] for each in pairs(12, seed=number))
    ids = torch.arange(first, last)
    return Batch(images, tokens, ids, 0 * ids, [""] * len(ids), [""] * len(ids))


def split(whole: Batch, size: int) -> list[Batch]:
    """Micro-batches."""
    found = []
    for first in range(0, len(whole), size):
        rows = slice(first, first + size)
        ids = whole.sample_ids[rows]
        names = [""] * len(ids)
        found.append(Batch(whole.images[rows], whole.tokens[rows], ids, 0 * ids, names, names))
    return found


class KeepingOptimizer(Optimizer):
    """Keeps the gradients of the last step, and takes a plain gradient step."""

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        self.kept = {parameter: parameter.grad.clone() for parameter in self.parameters}
        for parameter, grad in self.kept.items():
            parameter -= 0.05 * grad
        self.inner.zero_grad()


@dataclass(frozen=True)
class Parts:
    """A step with what it is made of."""

    clip: Clip
    supervision: TokenSupervision
    optimizer: KeepingOptimizer
    step: TrainingStep

    @property
    def head(self) -> TokenHead:
        return self.supervision.head

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of the last step, by name."""
        return {name: self.optimizer.kept[p] for name, p in named(self).items()}


def named(parts: Parts) -> dict[str, nn.Parameter]:
    both = nn.ModuleDict({"towers": parts.clip.towers, "head": parts.head})
    return dict(both.named_parameters())


def parts_of(method: str = "openclip") -> Parts:
    """The parts of a step, equal on all ranks."""
    clip = tiny()
    towers = clip.towers.double()
    towers.visual.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    torch.manual_seed(1)
    supervision = TokenSupervision(TokenHead(32, 64).double(), WEIGHT)
    loss = create_loss(method, embed_dim=16).double()
    optimizer = KeepingOptimizer(towers, resolve(RunConfig(), 1).optim, 10, head=supervision.head)
    wrapped = collectives.data_parallel(towers, CPU)
    step = TrainingStep(clip, wrapped, loss, optimizer, CPU, supervision=supervision)
    return Parts(clip, supervision, optimizer, step)


def supervise(size: int) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Three steps on this rank's share of each batch, in micro-batches of a size.

    Returns:
        The token losses of this rank, the weights of the towers, and the state of the head.
    """
    torch.set_num_threads(1)
    parts = parts_of()
    share = 12 // collectives.world_size()
    first = collectives.rank() * share
    results = [
        parts.step(split(pairs_of(number, first, first + share), size)) for number in range(3)
    ]
    losses = [result.token_loss for result in results]
    return losses, parts.clip.towers.state_dict(), parts.head.state_dict()
