"""A cell of the study: one run, and the settings it trains with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuclip.config.recipes import merge
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate

BATCH = 64
"""The batch for which learning rates are given."""
WARM_UP = 200 * BATCH
"""Pairs of the linear warm-up, the same at every batch."""
PRECISION = "fp32"
RECORDS = 40
"""Records of the training curve in a row, about."""
SAVED_EVERY = 32_000
"""Pairs between two checkpoints, from which an interrupted run goes on."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data_set: name of the data set.
        model: the architecture.
        label: the method.
        note: distinguishes the cells of one method.
        method: settings of the method, including its name.
        lr: peak learning rate at batch 64; it grows with the root of the pairs in a step.
        batch: pairs in memory: a micro-batch.
        accum: micro-batches in a step, whose gradient is that of the whole step, exactly.
        passes: over the training pairs.
        evaluated_every: passes between two evaluations.
        seed: of the run.
        precision: of the towers.
        sections: settings of other sections than the method's, laid over those below.
    """

    data_set: str
    model: str
    label: str
    note: str
    method: Mapping[str, Any]
    lr: float
    batch: int
    accum: int
    passes: int
    evaluated_every: int
    seed: int
    precision: str = PRECISION
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Tells the cell from all others; the name of its folder."""
        batch = f"b{self.batch}x{self.accum}" if self.accum > 1 else f"b{self.batch}"
        return "_".join((self.data_set, self.label, self.note, batch, f"s{self.seed}"))

    @property
    def pairs_per_step(self) -> int:
        """Pairs in a step."""
        return self.batch * self.accum

    def config(self, train: Path, splits: list[Path], logs: Path, pairs: int) -> RunConfig:
        """The settings of the run.

        Args:
            train: folder of the training data.
            splits: folders of the development splits.
            logs: folder of the run folder.
            pairs: number of training pairs.
        """
        steps = self.passes * pairs // self.pairs_per_step
        tree: dict[str, Any] = {
            "name": self.name,
            "seed": self.seed,
            "resume": "auto",
            "device": "cpu",
            "method": dict(self.method),
            "model": {"name": self.model, "precision": self.precision},
            "data": {
                "train_data": str(train),
                "batch_size": self.batch,
                "accum_freq": self.accum,
                "workers": 0,
            },
            "optim": {
                "epochs": self.passes,
                "lr": self.lr * (self.pairs_per_step / BATCH) ** 0.5,
                "warmup": max(1, WARM_UP // self.pairs_per_step),
                "wd": 0.1,
                "lr_tau": 1e-3,
                "lr_tau_scheduler": "const",
            },
            "evaluation": {
                "val_data": "::".join(map(str, splits)),
                "val_frequency": self.evaluated_every,
            },
            "output": {
                "logs": str(logs),
                "save_frequency": 0,
                "save_every_steps": max(1, SAVED_EVERY // self.pairs_per_step),
                "keep_step_checkpoints": 1,
                "log_every_n_steps": max(1, steps // RECORDS),
            },
        }
        changes = {name: dict(section) for name, section in self.sections.items()}
        return validate(merge(tree, changes), self.name)
