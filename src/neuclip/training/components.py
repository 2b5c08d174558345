"""What a run is made of."""

from dataclasses import dataclass

import torch

from neuclip.config.run_config import RunConfig
from neuclip.data.loader import TrainLoader
from neuclip.data.samples import Damage
from neuclip.evaluation.datacomp.sets import TaskSet
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import Clip
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder
from neuclip.training.optim import Optimizer


@dataclass(frozen=True)
class Parts:
    """The parts, put together by `neuclip.training.assemble`.

    Attributes:
        zero_shot: what is judged every `zeroshot_frequency` epochs.
        num_samples: rows of a table by sample id.
        shard_damage: what the index of the training data could not read.
    """

    config: RunConfig
    folder: RunFolder
    device: torch.device
    clip: Clip
    loss: PairLoss
    optimizer: Optimizer
    loader: TrainLoader
    splits: list[EvaluationSplit]
    zero_shot: list[TaskSet]
    num_samples: int
    shard_damage: tuple[Damage, ...]

    @property
    def process_batch_size(self) -> int:
        """Pairs in a step of one process, over all its micro-batches."""
        return self.config.data.batch_size * self.config.data.accum_freq

    @property
    def global_batch_size(self) -> int:
        """Pairs in a step, over all processes."""
        return self.process_batch_size * collectives.world_size()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return self.loader.steps_per_epoch

    @property
    def last_epoch(self) -> int:
        """The epoch after which the run ends."""
        return self.config.optim.stop_epochs or self.config.optim.epochs

    @property
    def temperature(self) -> float:
        """The temperature now."""
        scale = self.clip.towers.logit_scale
        assert isinstance(scale, torch.Tensor)
        return float((-scale.detach()).exp())

    def position(self, step: int) -> dict[str, float]:
        """Where a run is after a number of steps, as records say it."""
        return {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "samples_seen": step * self.global_batch_size,
        }
