"""The paths of a run folder. Imports no torch, so that the report and the help start at once.

<logs>/<name>/
config.yaml         the settings as asked for, with the sizes they came to
metrics.jsonl       one JSON record a line
out.log             what the terminal showed
data_report.json    corrupt samples and shards that were met
trace.json          the profiler's trace (--profile)
report.html         the page of `neuclip report`, where no other was asked for
checkpoints/        epoch_N.pt, iter_N.pt, epoch_latest.pt, SHA256SUMS
eval_results/       epoch_N_eval_results.jsonl, gallery_SPLIT.json, outcomes/
"""

from dataclasses import dataclass
from pathlib import Path

LATEST = "epoch_latest.pt"
"""The newest checkpoint of a run: a second name of its file."""
EVAL_RESULTS = "eval_results"
PLAIN = "weights"
"""In the name of results of a checkpoint's weights, where it holds their moving average too."""


@dataclass(frozen=True)
class RunFolder:
    """`<logs>/<name>` and the files in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings as asked for, with the sizes they came to."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The records: one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the terminal showed."""
        return self.path / "out.log"

    @property
    def data_report(self) -> Path:
        """Corrupt samples and shards that were met."""
        return self.path / "data_report.json"

    @property
    def trace(self) -> Path:
        """The profiler's trace."""
        return self.path / "trace.json"

    @property
    def report(self) -> Path:
        """The HTML report of this run alone."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The newest checkpoint."""
        return _newer_form(self.checkpoints / LATEST)

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint after `epoch` whole epochs."""
        return _newer_form(self.checkpoints / f"epoch_{epoch}.pt")

    def step_checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return _newer_form(self.checkpoints / f"iter_{step}.pt")

    @property
    def eval_results(self) -> Path:
        """The folder of evaluation results."""
        return self.path / EVAL_RESULTS

    def results(self, epoch: int, *, plain: bool = False) -> Path:
        """Evaluation results of an epoch's checkpoint, in DataComp's line format.

        Args:
            epoch: of the checkpoint.
            plain: for the weights of a run that is evaluated by their moving average.
        """
        return self.results_of(f"epoch_{epoch}", plain=plain)

    def results_of(self, checkpoint: str, *, plain: bool = False) -> Path:
        """Evaluation results of a checkpoint by its name, as `results`."""
        name = f"{checkpoint}_{PLAIN}" if plain else checkpoint
        return self.eval_results / f"{name}_eval_results.jsonl"

    def gallery(self, split: str) -> Path:
        """The gallery of a split."""
        return self.eval_results / f"gallery_{split}.json"

    def split_outcomes(self, split: str) -> Path:
        """Outcomes per sample of a split's latest evaluation."""
        return self.eval_results / "outcomes" / f"split_{split}.npz"


def outcomes_path(results: Path, key: str) -> Path:
    """Outcomes per sample of a task, in a folder beside the results file.

    Args:
        results: the results file.
        key: the task.
    """
    return results.parent / "outcomes" / results.stem / f"{key.replace('/', '-')}.npz"


def _newer_form(file: Path) -> Path:
    """The file, or the folder of a sharded checkpoint, whichever was written last; else the file.

    A run that was continued with or without --fsdp may have both.
    """
    found = [path for path in (file, file.with_suffix("")) if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=file)
