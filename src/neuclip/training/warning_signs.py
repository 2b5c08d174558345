"""Signs that a run goes wrong, found in its records. They are logged, recorded, and on the report.

A detector is a function of the records so far: nothing else is kept, so a resumed run warns as one
that nothing interrupted. To add a sign, write a detector and list it in `AFTER_TRAINING_RECORD` or
`AFTER_EVALUATION`. Each sign is reported once per run and subject.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from neuclip.config.run_config import RunConfig
from neuclip.evaluation.metric_names import MAIN_METRICS
from neuclip.run_folder import is_canary

Record = Mapping[str, Any]

FALLING_EVALUATIONS = 3
"""Evaluations in a row, each below the one before, after which validation counts as falling."""
FORGETTING = 0.1
"""Fraction of its score with the starting weights that a canary may lose without a warning."""


@dataclass(frozen=True)
class WarningSign:
    """One sign.

    Attributes:
        name: the kind of sign, such as `overfitting`.
        text: what was seen, and the remedy, in one sentence.
        subject: the evaluation split that shows it; empty: the run itself.
    """

    name: str
    text: str
    subject: str = ""


@dataclass
class History:
    """The records of a run so far, by ascending step.

    Attributes:
        config: the settings of the run.
        train: the training records.
        evaluations: the evaluation records of each split.
        reported: name and subject of the signs that were reported.
    """

    config: RunConfig
    train: list[Record] = field(default_factory=list[Record])
    evaluations: dict[str, list[Record]] = field(default_factory=dict[str, list[Record]])
    reported: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(self, record: Record) -> None:
        """Adds a record of any kind."""
        kind = record.get("kind")
        if kind == "train":
            self.train.append(record)
        elif kind == "eval":
            self.evaluations.setdefault(str(record["split"]), []).append(record)
        elif kind == "warning":
            self.reported.add((str(record["sign"]), str(record["subject"])))

    def losses_between(self, first: int, last: int) -> list[float]:
        """The training losses recorded after step `first` and up to step `last`."""
        found: list[float] = []
        for record in reversed(self.train):
            if record["step"] <= first:
                break
            if record["step"] <= last and record.get("loss") is not None:
                found.append(float(record["loss"]))
        return found[::-1]


Detector = Callable[[History], Iterable[WarningSign]]


def overfitting(history: History) -> Iterable[WarningSign]:
    """The main metric of a split fell `FALLING_EVALUATIONS` times while the training loss fell."""
    for split, records in history.evaluations.items():
        if is_canary(split) or len(records) <= FALLING_EVALUATIONS:
            continue
        shown = records[-FALLING_EVALUATIONS - 1 :]
        scores = [main_score(record) for record in shown]
        falls = all(a is not None and b is not None and b < a for a, b in pairwise(scores))
        steps = [int(record["step"]) for record in shown]
        before = history.losses_between(steps[0], steps[1])
        now = history.losses_between(steps[-2], steps[-1])
        if falls and before and now and sum(now) / len(now) < sum(before) / len(before):
            first, last = scores[0] or 0.0, scores[-1] or 0.0
            yield WarningSign(
                "overfitting",
                f"{split} fell in {FALLING_EVALUATIONS} evaluations in a row (from {first:.1%} to "
                f"{last:.1%}) while the training loss fell: the run overfits. --best-metric keeps "
                "the best epoch, --early-stop ends the run; fewer epochs, a lower --lr or stronger "
                "augmentation help",
                split,
            )


def forgetting(history: History) -> Iterable[WarningSign]:
    """A canary lost more than `FORGETTING` of its score with the starting weights."""
    for split, records in history.evaluations.items():
        if not is_canary(split) or len(records) < 2 or records[0]["step"] != 0:
            continue
        start, now = main_score(records[0]), main_score(records[-1])
        if start is not None and now is not None and now < (1 - FORGETTING) * start:
            yield WarningSign(
                "forgetting",
                f"{split} fell from {start:.1%} with the starting weights to {now:.1%}: the model "
                "forgets. A lower --lr, fewer epochs or a locked tower keep more",
                split,
            )


AFTER_TRAINING_RECORD: list[Detector] = []
AFTER_EVALUATION: list[Detector] = [overfitting, forgetting]


def main_score(record: Record) -> float | None:
    """The main metric of an evaluation record; none if it has none."""
    metrics = record.get("metrics") or {}
    keys = ("main_metric", *(metric.key for metric in MAIN_METRICS))
    return next((metrics[key] for key in keys if metrics.get(key) is not None), None)


class WarningSigns:
    """Watches the records of a run.

    Args:
        config: the settings of the run.
        earlier: the records that a resumed run continues.
    """

    def __init__(self, config: RunConfig, earlier: Sequence[Record] = ()) -> None:
        self._history = History(config)
        for record in earlier:
            self._history.add(record)

    def after(self, record: Record) -> list[WarningSign]:
        """Adds a record, and returns the signs that it completes and nothing reported before."""
        history = self._history
        history.add(record)
        detectors = {"train": AFTER_TRAINING_RECORD, "eval": AFTER_EVALUATION}.get(
            str(record["kind"]), []
        )
        new: list[WarningSign] = []
        for sign in (sign for detector in detectors for sign in detector(history)):
            if (sign.name, sign.subject) not in history.reported:
                history.reported.add((sign.name, sign.subject))
                new.append(sign)
        return new
