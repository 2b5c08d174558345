"""Exact gradient accumulation: the loss of many micro-batches as if they were one batch.

A contrastive loss is not a sum over micro-batches, so adding their gradients would be wrong.
Instead (GradCache, arXiv 2101.06983):

1. every micro-batch is encoded without a graph, and its random state is saved;
2. the loss is evaluated once over all features, which are leaves; it updates its own state once;
3. every micro-batch is encoded again with its random state, and its rows of the feature gradient
   are backpropagated through the towers.

Memory holds the graph of one micro-batch and the features of all; the towers run forward twice.
BatchNorm normalises by the statistics of a micro-batch, as in open_clip, and only step 1 updates
its running statistics.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip.data.batch import Batch
from neuclip.parallel import collectives
from neuclip.training.nonfinite import PER_PAIR, Outputs

Encode = Callable[[Batch], Outputs]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class RandomState:
    """The states of the generators that the towers draw from.

    Attributes:
        cpu: of the CPU's generator.
        accelerator: of the device's generator; none on a CPU.
    """

    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Reads the current states."""
        accelerator = None
        if device.type == "cuda":
            accelerator = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            accelerator = torch.mps.get_rng_state()
        return cls(torch.get_rng_state(), accelerator)

    def restore(self, device: torch.device) -> None:
        """Sets the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None and device.type == "mps":
            torch.mps.set_rng_state(self.accelerator)
        elif self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, device)


class CachedFeatures:
    """The features of several micro-batches, and the backward pass from their gradient.

    Args:
        encode: returns the towers' outputs for a micro-batch, as open_clip's dict.
        batches: the micro-batches.
        device: of the towers.

    Attributes:
        outputs: leaf tensors: the features of all pairs, [pairs, dim] (of images, texts, and hard
            negatives if there are any), and the scalars
            `logit_scale` and `logit_bias`, which all micro-batches share.
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
            name: (torch.cat([each[name] for each in encoded]) if name in PER_PAIR else value)
            .detach()
            .clone()
            .requires_grad_()
            for name, value in encoded[0].items()
        }

    def backward(self, towers: nn.Module) -> None:
        """Backpropagates the leaves' gradients through the towers, one micro-batch at a time.

        Over several ranks only the last micro-batch communicates. It also carries the gradients of
        the scalars (`logit_scale`), which are counted once and averaged with the rest.

        Args:
            towers: the module that `encode` calls; its BatchNorm statistics are frozen meanwhile.
        """
        after = RandomState.now(self._device)
        last, start = len(self._batches) - 1, 0
        with running_statistics_frozen(towers):
            for number, (batch, state) in enumerate(zip(self._batches, self._states, strict=True)):
                stop = start + len(batch)
                state.restore(self._device)
                gradients = self._gradients(start, stop, scalars=number == last)
                with nullcontext() if number == last else collectives.no_sync(towers):
                    _backward(self._encode(batch), gradients)
                start = stop
        after.restore(self._device)

    def _gradients(self, start: int, stop: int, *, scalars: bool) -> Outputs:
        """Gradients of the pairs from `start` to `stop`, and of the scalars if asked for."""
        return {
            name: leaf.grad[start:stop] if name in PER_PAIR else leaf.grad
            for name, leaf in self.outputs.items()
            if leaf.grad is not None and (scalars or name in PER_PAIR)
        }


def _backward(outputs: Outputs, gradients: Outputs) -> None:
    """Backpropagates through one micro-batch; outputs of locked towers have no graph."""
    names = [name for name in gradients if outputs[name].requires_grad]
    if names:
        torch.autograd.backward(
            [outputs[name] for name in names], [gradients[name] for name in names]
        )


@contextmanager
def running_statistics_frozen(towers: nn.Module) -> Generator[None]:
    """BatchNorm still normalises by its batch, but does not update its running statistics."""
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
