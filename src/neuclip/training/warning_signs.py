"""Signs that a run goes wrong, found in its records. They are logged, recorded, and on the report.

A detector is a function of the records so far: nothing else is kept, so a resumed run warns as one
that nothing interrupted. To add a sign, write a detector and list it in `AFTER_TRAINING_RECORD` or
`AFTER_EVALUATION`. Each sign is reported once per run and subject.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from neuclip.catalogue.method_settings import (
    GlobalContrastiveSettings,
    LearnedTemperatureSettings,
    MethodSettings,
)
from neuclip.config.run_config import RunConfig
from neuclip.evaluation.metric_names import MAIN_METRICS
from neuclip.run_folder import is_canary

Record = Mapping[str, Any]

FALLING_EVALUATIONS = 3
"""Evaluations in a row, each below the one before, after which validation counts as falling."""
FORGETTING = 0.1
"""Fraction of its score with the starting weights that a canary may lose without a warning."""
RECORDS = 3
"""Training records in a row that show a sign of the run itself."""
EARLY = 100
"""Steps, besides the warm-up, in which such signs mean nothing yet."""
STUCK = 0.98
"""Fraction of ln B above which a mini-batch loss counts as that of random embeddings."""
COLLAPSED = 0.98
"""Mean cosine of two embeddings of one side from which they count as the same."""
HIGHER_BOUND = 0.03
"""Lower bound of the temperature that the study of quality tried instead of open_clip's."""
ALIKE = 0.5
"""Fraction of pairs with a caption that is not theirs alone from which a warning is due."""


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


def nothing_learned(history: History) -> Iterable[WarningSign]:
    """The batch loss stays at ln B, which embeddings give that tell nothing.

    InfoNCE is log(1 + (B - 1) g): it is ln B where g = 1. Other methods record the mean log g.
    """
    records = _settled(history)
    batch = history.config.data.global_batch_size
    if len(records) < RECORDS or batch is None:
        return
    chance = math.log(batch)
    if history.config.method.method == "openclip":
        stuck = all(_contrastive_loss(record) >= STUCK * chance for record in records)
    else:
        stuck = all(_number(record, "batch_log_inner") >= -0.05 for record in records)
    if stuck:
        yield WarningSign(
            "nothing_learned",
            f"in {RECORDS} records the batches' loss stayed at ln {batch} = {chance:.2f}, that of "
            "random embeddings: nothing is learned. Look whether captions belong to their images "
            f"(neuclip data inspect), then try another --lr (now {history.config.optim.lr:g})",
        )


def temperature_at_its_bound(history: History) -> Iterable[WarningSign]:
    """The temperature ran to where the trainer clamps it, and did not start there."""
    records = _settled(history)
    if len(records) < RECORDS:
        return
    method = history.config.method
    start = _number(history.train[0], "temperature")
    low, high = method.temperature_bounds
    chosen = low > method.TEMPERATURE_BOUNDS[0]  # by the user, to be met
    for bound in (high,) if chosen else (low, high):
        reached = all(abs(_number(record, "temperature") / bound - 1) < 1e-3 for record in records)
        if reached and abs(start / bound - 1) > 0.05:
            yield WarningSign(
                "temperature_at_bound",
                f"the temperature ran from {start:.3g} to its bound, {bound:g}: "
                + _holding_it(method, min(start, HIGHER_BOUND) if bound == low else None),
            )


def _holding_it(method: MethodSettings, higher_bound: float | None) -> str:
    """What holds the temperature: a higher lower bound, where it fell to the lower one."""
    remedies = ["a lower --lr-tau"]
    if higher_bound is not None and isinstance(method, LearnedTemperatureSettings):
        remedies.insert(0, f"--temperature-min {higher_bound:.3g}")
    if not isinstance(method, GlobalContrastiveSettings):
        return f"{' or '.join(remedies)} holds it"
    remedies.append(f"a {'higher' if higher_bound is None else 'lower'} --rho")
    *others, last = remedies
    return (
        f"{', '.join(others)} or {last} holds it "
        "(given weights: --rho auto with --warm-start-steps)"
    )


def collapsed(history: History) -> Iterable[WarningSign]:
    """All images, or all texts, have nearly the same embedding."""
    records = _settled(history)
    remedy = "Start again with a lower --lr or a longer --warmup"
    if hasattr(history.config.method, "queue_warm_up"):
        remedy += ", or a longer --queue-warm-up; the queue of --method moco moves slowly"
    for side in ("image", "text"):
        values = [_number(record, f"{side}_cosine") for record in records]
        if len(values) >= RECORDS and min(values) > COLLAPSED:
            yield WarningSign(
                "collapsed",
                f"any two {side}s of a batch have a cosine of {values[-1]:.3f} in the mean: the "
                f"{side} embeddings have collapsed. {remedy}",
                side,
            )


def captions_alike(history: History) -> Iterable[WarningSign]:
    """Most pairs of the batches share their caption with another pair."""
    records = history.train[-2:]
    shares = [_number(record, "equal_captions") for record in records]
    if len(shares) < 2 or not min(shares) >= ALIKE or history.config.data.false_negatives == "mask":
        return
    which = "every pair" if min(shares) == 1 else f"{min(shares):.0%} of the pairs"
    yield WarningSign(
        "captions_alike",
        f"{which} of a batch had a caption that another pair of it has, too: they count as "
        "negatives of each other. --false-negatives mask leaves them out, --no-duplicates keeps "
        "them apart; neuclip data inspect counts them",
    )


def _settled(history: History) -> list[Record]:
    """The newest training records, as far as they are after the warm-up."""
    first = max(history.config.optim.warmup, EARLY)
    return [record for record in history.train[-RECORDS:] if record["step"] > first]


def _contrastive_loss(record: Record) -> float:
    """InfoNCE of a record alone: `loss` has a teacher's and a token head's, too."""
    sides = [_number(record, f"{side}_loss") for side in ("image", "text")]
    return _number(record, "loss") if "image_loss" not in record else sum(sides) / 2


def _number(record: Record, key: str) -> float:
    """A number of a record; NaN, of which nothing is true, if it is missing or was not finite."""
    value = record.get(key)
    return math.nan if value is None else float(value)


AFTER_TRAINING_RECORD: list[Detector] = [
    nothing_learned,
    temperature_at_its_bound,
    collapsed,
    captions_alike,
]
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
