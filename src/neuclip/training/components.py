"""The components of a run, as `neuclip.training.assemble` builds them."""

from dataclasses import dataclass

import torch

from neuclip.config.run_config import RunConfig
from neuclip.data.identity import DataIdentity
from neuclip.data.loader import TrainLoader
from neuclip.data.samples import Damage
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.base_weights import LowRankRecord
from neuclip.model.clip import Clip
from neuclip.run_folder import RunFolder
from neuclip.training.evaluation_plan import EvaluationPlan
from neuclip.training.optim import Optimizer
from neuclip.training.teacher import Teacher
from neuclip.training.token_supervision import TokenSupervision


@dataclass(frozen=True)
class Components:
    """The components of a run.

    Attributes:
        config: the settings, resolved.
        folder: the run folder.
        device: the device of the towers.
        clip: the model.
        loss: the method's loss.
        optimizer: of the towers.
        loader: the training data.
        plan: what the run evaluates.
        num_samples: rows of the loss's tables, indexed by sample id.
        shard_damage: what the index of the training data could not read.
        data: identity of the training data.
        unused: what the training data hold but the run does not read, in one line per reason.
        held_out: digest of the training samples that are held out for evaluation; none if all are
            trained on.
        low_rank: what a checkpoint records of LoRA; none without.
        teacher: of distillation; none without.
        supervision: by tokens; none without.
    """

    config: RunConfig
    folder: RunFolder
    device: torch.device
    clip: Clip
    loss: PairLoss
    optimizer: Optimizer
    loader: TrainLoader
    plan: EvaluationPlan
    num_samples: int
    shard_damage: tuple[Damage, ...]
    data: DataIdentity
    unused: tuple[str, ...] = ()
    held_out: str | None = None
    low_rank: LowRankRecord | None = None
    teacher: Teacher | None = None
    supervision: TokenSupervision | None = None

    @property
    def last_epoch(self) -> int:
        """The epoch after which the run ends."""
        return self.config.optim.stop_epochs or self.config.optim.epochs

    def position(self, step: int) -> dict[str, float]:
        """The position of a run after `step` steps, as its records give it."""
        return {
            "step": step,
            "epoch": round(step / self.loader.steps_per_epoch, 4),
            "samples_seen": step * self.loader.global_batch_size,
        }
