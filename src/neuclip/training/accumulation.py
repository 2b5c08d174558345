"""Exact gradient accumulation: the loss of many micro-batches as if they were one batch.

A contrastive loss is no sum over micro-batches, so their gradients cannot just be added. Instead
(GradCache, arXiv 2101.06983):

1. every micro-batch is encoded without a graph, and its random state is kept;
2. the loss is evaluated once over all features, which are leaves: it steps its own state once;
3. every micro-batch is encoded again with its random state, and its part of the gradient by the
   features goes back through the towers.

Memory is that of one micro-batch's graph and of the features; the towers run forwards twice.
BatchNorm normalises by the statistics of a micro-batch, as in open_clip, and only step 1 moves its
running statistics.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip.data.batch import Batch
from neuclip.parallel import collectives
from neuclip.training.nonfinite import FEATURES, Outputs

Encode = Callable[[Batch], Outputs]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class RandomState:
    """Where the random numbers of the towers stand."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The state of the CPU's numbers, and of the device's."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        """Goes back there."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class CachedFeatures:
    """The features of several micro-batches, and the way back from their gradient to the towers.

    Args:
        encode: the towers' outputs of a micro-batch, in open_clip's dict.
        batches: the micro-batches.
        device: of the towers.

    Attributes:
        outputs: leaves: the features of all pairs, [pairs, dim], and `logit_scale` and
            `logit_bias`, which are the same for every micro-batch.
    """

    def __init__(self, encode: Encode, batches: Sequence[Batch], device: torch.device) -> None:
        self._encode, self._batches, self._device = encode, batches, device
        self._states: list[RandomState] = []
        encoded: list[Outputs] = []
        with torch.no_grad():
            for batch in batches:
                self._states.append(RandomState.now(device))
                encoded.append(encode(batch))
        self.outputs = {
            name: (torch.cat([each[name] for each in encoded]) if name in FEATURES else value)
            .detach()
            .clone()
            .requires_grad_()
            for name, value in encoded[0].items()
        }

    def backward(self, towers: nn.Module) -> None:
        """Carries the leaves' gradients on into the towers, micro-batch by micro-batch.

        With several processes only the last one communicates; it also carries what belongs to the
        model as a whole (`logit_scale`), so that this is counted once and averaged with the rest.

        Args:
            towers: what `encode` calls; its BatchNorm layers are held, its processes synchronised.
        """
        after = RandomState.now(self._device)
        last, start = len(self._batches) - 1, 0
        with _running_statistics_held(towers):
            for number, (batch, state) in enumerate(zip(self._batches, self._states, strict=True)):
                stop = start + len(batch)
                state.restore(self._device)
                waits = nullcontext() if number == last else collectives.no_sync(towers)
                with waits:
                    _backward(
                        self._encode(batch), self._gradients(start, stop, whole=number == last)
                    )
                start = stop
        after.restore(self._device)

    def _gradients(self, start: int, stop: int, *, whole: bool) -> Outputs:
        """The gradients of the pairs from `start` to `stop`; `whole`: also those of the model."""
        return {
            name: leaf.grad[start:stop] if name in FEATURES else leaf.grad
            for name, leaf in self.outputs.items()
            if leaf.grad is not None and (whole or name in FEATURES)
        }


def _backward(outputs: Outputs, gradients: Outputs) -> None:
    """Back through one micro-batch; an output of a locked tower has no way back."""
    names = [name for name in gradients if outputs[name].requires_grad]
    if names:
        torch.autograd.backward(
            [outputs[name] for name in names], [gradients[name] for name in names]
        )


@contextmanager
def _running_statistics_held(towers: nn.Module) -> Generator[None]:
    """BatchNorm normalises by its batch as ever, but does not count it again."""
    tracking = [
        module
        for module in towers.modules()
        if isinstance(module, _BATCH_NORMS) and module.training and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
