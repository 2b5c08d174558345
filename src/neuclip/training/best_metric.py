"""`--best-metric` and `--early-stop`: a metric chooses the best checkpoint, and ends a run early.

The state is in the checkpoint. A checkpoint is written before the evaluation at its step, so a
resumed run takes this evaluation from the records, or repeats it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neuclip.config.sections import AUTO, EvaluationConfig
from neuclip.errors import UserError
from neuclip.evaluation.evaluate import EvaluationSet
from neuclip.evaluation.metric_names import MAIN_METRICS, METRICS
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.run_folder import CANARY

_MAIN = "main_metric"
_BETTER = {_MAIN: "high", **{metric.key: metric.better for metric in METRICS}}


class BestMetric:
    """Follows a metric over the evaluations of a run.

    Epoch 0, the evaluation of the starting weights, is a reference only: there is no checkpoint of
    it, and its value is in `start`.

    Args:
        split: key of the evaluation set.
        metric: key of the metric.
        early_stop: evaluations without improvement after which the run ends; none: never.

    Attributes:
        start: value of the starting weights; none if they were not evaluated.
        value: best value so far; none before the first.
        step: steps done at the best value.
        epoch: epochs done at the best value.
        misses: evaluations since the best value.
    """

    def __init__(self, split: str, metric: str, early_stop: int | None = None) -> None:
        self.split, self.metric = split, metric
        self._early_stop = early_stop
        self.start: float | None = None
        self.value: float | None = None
        self.step = self.epoch = self.misses = 0

    @property
    def name(self) -> str:
        """The metric as `--best-metric` names it."""
        return f"{self.split}/{self.metric}"

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return self._early_stop is not None and self.misses >= self._early_stop

    def value_in(self, metrics: Mapping[str, float]) -> float:
        """The metric among those of an evaluation.

        Raises:
            UserError: the evaluation does not have it, such as recall@10 over ten captions.
        """
        if self.metric not in metrics:
            raise UserError(
                f"--best-metric {self.name}: the evaluation has only {', '.join(metrics)}"
            )
        return metrics[self.metric]

    def update(self, value: float | None, step: int, epoch: int) -> bool:
        """Takes the value of an evaluation, and returns whether it is the best so far.

        Args:
            value: of the metric; none or not finite: no improvement.
            step: steps done.
            epoch: epochs done; 0: the starting weights.
        """
        finite = value if value is not None and math.isfinite(value) else None
        if epoch == 0:
            self.start = finite
            return False
        if finite is None or not self._is_better(finite, self.value):
            self.misses += 1
            return False
        self.value, self.step, self.epoch, self.misses = finite, step, epoch, 0
        return True

    def summary(self) -> str:
        """The best epoch in one sentence; says so if the starting weights are better."""
        if self.value is None:
            return f"no evaluation gave {self.name}: there is no best checkpoint"
        text = f"best {self.name}: {self.value:.4g} after epoch {self.epoch}"
        if self.start is None:
            return text
        text += f" (starting weights: {self.start:.4g})"
        if not self.improves:
            text += "; training did not improve on the starting weights"
        return text

    @property
    def improves(self) -> bool:
        """Whether the best epoch is better than the starting weights, if those were evaluated."""
        return self.value is not None and self._is_better(self.value, self.start)

    def _is_better(self, value: float, other: float | None) -> bool:
        if other is None:
            return True
        return value < other if _BETTER[self.metric] == "low" else value > other

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        return {
            "name": self.name,
            "start": self.start,
            "value": self.value,
            "step": self.step,
            "epoch": self.epoch,
            "misses": self.misses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state.

        Raises:
            KeyError: an entry is missing.
        """
        self.start, self.value = state["start"], state["value"]
        self.step, self.epoch, self.misses = state["step"], state["epoch"], state["misses"]


def choose_metric(config: EvaluationConfig, sets: Sequence[EvaluationSet]) -> BestMetric | None:
    """The metric of `--best-metric`; none without the flag.

    Args:
        config: the settings.
        sets: the sets that the run evaluates.

    Raises:
        UserError: no set has the metric; names those that exist.
    """
    name = config.best_metric
    if name is None:
        return None
    known = [f"{each.key}/{metric}" for each in sets for metric in _metrics_of(each)]
    if not known:
        raise UserError(
            f"--best-metric {name}: this run evaluates nothing; add --val-data or --val-split"
        )
    if name == AUTO:
        own = [each for each in sets if not each.key.startswith(CANARY)]
        if not own:
            raise UserError(
                "--best-metric auto follows validation data, and this run has canaries alone: add "
                "--val-data or --val-split"
            )
        return BestMetric(own[0].key, _main_metric_of(own[0]), config.early_stop)
    if name not in known:
        raise UserError(f"--best-metric {name} is not a metric of this run, which has: "
                        f"{', '.join(known)}")  # fmt: skip
    split, _, metric = name.rpartition("/")
    return BestMetric(split, metric, config.early_stop)


def _main_metric_of(data: EvaluationSet) -> str:
    """The metric that stands for a set: of a split, the name of its main metric."""
    possible = _metrics_of(data)
    return next((main.key for main in MAIN_METRICS if main.key in possible), _MAIN)


def _metrics_of(data: EvaluationSet) -> list[str]:
    """The metrics of a set that tell better from worse, as far as its kind tells them."""
    if not isinstance(data, EvaluationSplit):
        return [_MAIN]
    ranked = [metric.key for metric in METRICS if "retrieval_recall@" in metric.key]
    classes = ["acc1", "acc5", "mean_per_class_recall"] if data.classnames else []
    texts = ["mean_recall@1", "val_loss", *ranked] if data.index.has_captions else []
    found = [*texts, *classes]
    return [*found, _MAIN]
