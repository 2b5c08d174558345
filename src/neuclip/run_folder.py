"""The paths of a run folder and the reader of its records. Imports no torch, to start at once.

<logs>/<name>/
config.yaml         the settings as given, with the sizes derived from them
metrics.jsonl       one JSON record per line
out.log             the terminal's output
run.lock            the process that uses the folder now
data_report.json    identity of the training data, corrupt samples and shards
nonfinite_step_N_rank_R.json    the batch of a step with NaN or infinity
trace.json          the profiler's trace (--profile)
tensorboard/        events for TensorBoard (--report-to tensorboard)
wandb/              files of Weights & Biases (--report-to wandb)
run_id              the run's id in Weights & Biases, which a resumed run keeps
report.html         the page of `neuclip report`, unless --out names another
checkpoints/        epoch_N.pt, iter_N.pt, epoch_latest.pt, epoch_best.pt, SHA256SUMS
eval_results/       epoch_N_eval_results.jsonl, gallery_SPLIT.json, outcomes/
params.txt          open_clip's record of its flags, in run folders of open_clip
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from neuclip.errors import UserError, printable
from neuclip.untrusted import open_regular, parse_json, read_file

LATEST = "epoch_latest.pt"
"""The newest checkpoint of a run: a second name of its file."""
BEST = "epoch_best.pt"
"""The best checkpoint by `--best-metric`: a second name of its file."""
EVAL_RESULTS = "eval_results"
PLAIN = "weights"
"""Marks results of a checkpoint's weights in file names, if the checkpoint also holds their moving
average."""
CANARY = "canary:"
"""Prefix of the names of canaries: sets that show what a fine-tuned model forgets."""
_CHECKPOINTS = "checkpoints"
_LONGEST_RECORD = 2**20  # bytes
_LARGEST_RECORDS = 2**30  # bytes
_LARGEST_FLAGS = 2**20  # bytes


@dataclass(frozen=True)
class RunFolder:
    """`<logs>/<name>` and the files in it."""

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> "RunFolder":
        """The run folder of a checkpoint; for a checkpoint elsewhere, the folder it is in."""
        folder = checkpoint.parent
        return cls(folder.parent if folder.name == _CHECKPOINTS else folder)

    @property
    def config(self) -> Path:
        """The settings as given, with the sizes derived from them."""
        return self.path / "config.yaml"

    @property
    def open_clip_flags(self) -> Path:
        """open_clip's record of a run's flags, in run folders of open_clip."""
        return self.path / "params.txt"

    @property
    def metrics(self) -> Path:
        """The records: one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """The terminal's output."""
        return self.path / "out.log"

    @property
    def data_report(self) -> Path:
        """Identity of the training data, corrupt samples and shards."""
        return self.path / "data_report.json"

    def nonfinite_step(self, step: int, rank: int) -> Path:
        """The batch of a step with NaN or infinity, as one rank read it."""
        return self.path / f"nonfinite_step_{step}_rank_{rank}.json"

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
        return self.path / _CHECKPOINTS

    @property
    def latest(self) -> Path:
        """The newest checkpoint."""
        return _existing_form(self.checkpoints / LATEST)

    @property
    def best(self) -> Path:
        """The best checkpoint by `--best-metric`."""
        return _existing_form(self.checkpoints / BEST)

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint after `epoch` full epochs."""
        return _existing_form(self.checkpoints / f"epoch_{epoch}.pt")

    def step_checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return _existing_form(self.checkpoints / f"iter_{step}.pt")

    @property
    def eval_results(self) -> Path:
        """The folder of evaluation results."""
        return self.path / EVAL_RESULTS

    def results(self, epoch: int, *, plain: bool = False) -> Path:
        """Evaluation results of an epoch's checkpoint, in DataComp's line format.

        Args:
            epoch: of the checkpoint.
            plain: results of the weights, for a run that is evaluated by their moving average.
        """
        return self.results_of(f"epoch_{epoch}", plain=plain)

    def results_of(self, checkpoint: str, *, plain: bool = False) -> Path:
        """Evaluation results of a checkpoint by its name; see `results`."""
        name = f"{checkpoint}_{PLAIN}" if plain else checkpoint
        return self.eval_results / f"{name}_eval_results.jsonl"

    def results_by_epoch(self) -> dict[int, Path]:
        """The existing results of epochs, in their order; without those of plain weights."""
        found = {
            int(match[1]): path
            for path in self.eval_results.glob("epoch_*_eval_results.jsonl")
            if (match := re.fullmatch(r"epoch_(\d{1,15})_eval_results\.jsonl", path.name))
        }
        return dict(sorted(found.items()))

    def gallery(self, split: str) -> Path:
        """The gallery of a split."""
        return gallery_in(self.eval_results, split)

    def galleries(self) -> list[Path]:
        """The existing galleries, by name."""
        return sorted(self.eval_results.glob("gallery_*.json"))

    def split_outcomes(self, split: str) -> Path:
        """Outcomes per sample of a split's latest evaluation."""
        return split_outcomes_in(self.eval_results, split)


def is_canary(split: str) -> bool:
    """Whether an evaluation set shows what a fine-tuned model forgets: `--canary`, or ImageNet."""
    return split.startswith((CANARY, "imagenet-val", "imagenet-v2"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` without broken lines; empty if there is no such file.

    Raises:
        UserError: it cannot be read, is not a regular file, or is larger than 1 GiB.
    """
    try:
        return [record for record in record_lines(path) if record is not None]
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"cannot read {printable(str(path), 300)}: {why}") from None


def record_lines(path: Path) -> list[dict[str, Any] | None]:
    """The records of `metrics.jsonl`, one entry per line.

    A line that is not a JSON object with a step is broken, such as the last line of a killed run:
    its entry is None. Readers skip it, and a resumed run removes it from the file.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than 1 GiB.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_RECORDS:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than {_LARGEST_RECORDS:,}")
        return [_parse_record(line) for line in _lines(file)]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is longer than any record ends where the longest would."""
    while line := file.readline(_LONGEST_RECORD + 1):
        yield line
        while len(line) > _LONGEST_RECORD and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_RECORD + 1)


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, _LONGEST_RECORD)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def open_clip_flags(path: Path) -> dict[str, str]:
    """The flags of a run of open_clip, from its `params.txt`; without those that were not set.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than 1 MiB.
    """
    lines = read_file(path, _LARGEST_FLAGS).decode("utf-8", "replace").splitlines()
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return {key: value for key, value in found.items() if value != "None"}


def gallery_in(folder: Path, split: str) -> Path:
    """The gallery of a split in a folder of results."""
    return folder / f"gallery_{_in_file_name(split)}.json"


def split_outcomes_in(folder: Path, split: str) -> Path:
    """Outcomes per sample of a split in a folder of results."""
    return folder / "outcomes" / f"split_{_in_file_name(split)}.npz"


def outcomes_path(results: Path, key: str) -> Path:
    """Outcomes per sample of a task, in a folder beside the results file.

    Args:
        results: the results file.
        key: the task.
    """
    return results.parent / "outcomes" / results.stem / f"{_in_file_name(key)}.npz"


def _in_file_name(key: str) -> str:
    """The key of a split or task as a part of a file's name."""
    return key.replace("/", "-")


def _existing_form(file: Path) -> Path:
    """The folder of a sharded checkpoint if only that exists; else the file."""
    folder = file.with_suffix("")
    return folder if folder.is_dir() and not file.exists() else file
