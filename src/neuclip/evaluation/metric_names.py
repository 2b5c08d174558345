"""The metrics of an evaluation split by key: label, direction, format, and where each is shown.

The command line, the log, the report, the model card and the study read this table. Keys and
order of DataComp's own metrics are those of its results files. Imports no torch.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Better = Literal["high", "low", "neither"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a split.

    Attributes:
        key: key in results and records.
        label: name to display.
        hint: explanation of the label, if it needs one.
        better: which values are better.
        percent: shown as a percentage; if false, as a plain number.
        table: shown in the tables of `neuclip eval` and of the report.
        summary: shown in the report's first table, too.
        log: shown in the log line of an evaluation, and kept by the study.
        card: shown on the model card.
    """

    key: str
    label: str
    hint: str = ""
    better: Better = "high"
    percent: bool = True
    table: bool = True
    summary: bool = False
    log: bool = False
    card: bool = False

    @property
    def phrase(self) -> str:
        """The label inside a sentence."""
        return self.label[0].lower() + self.label[1:]


def _recalls(prefix: str, label: str, hint: str) -> list[Metric]:
    return [
        Metric(
            key=f"{prefix}_retrieval_recall@{k}", label=f"{label} R@{k}", hint=hint,
            summary=k == 1, log=k == 1, card=k == 1,
        )
        for k in (1, 5, 10)
    ]  # fmt: skip


def _errors(measure: str, short: str, better: Better) -> list[Metric]:
    """An error of the predicted log-normalizers, and the same error of the batch's estimate."""
    return [
        Metric(
            key=f"normalizer_{measure}", label=f"Log-normalizer {short}", better=better,
            percent=False, summary=measure == "mae",
        ),
        Metric(
            key=f"minibatch_normalizer_{measure}", label=f"Mini-batch estimate, {short}",
            hint="from the batch alone", better="neither", percent=False, summary=measure == "mae",
        ),
    ]  # fmt: skip


METRICS = (
    Metric(key="acc1", label="Zero-shot top-1", summary=True, log=True, card=True),
    Metric(key="acc5", label="Zero-shot top-5", summary=True, log=True),
    Metric(key="mean_per_class_recall", label="Mean per-class recall"),
    Metric(key="chance", label="Chance, top-1", better="neither", summary=True),
    Metric(key="mean_recall@1", label="Mean recall@1", table=False, log=True, card=True),
    *_recalls("image", "Image retrieval", "caption to image"),
    *_recalls("text", "Text retrieval", "image to caption"),
    Metric(
        key="val_loss",
        label="Validation loss",
        hint="InfoNCE over the whole split",
        better="low",
        percent=False,
        summary=True,
        log=True,
    ),
    Metric(
        key="truncated_captions",
        label="Captions cut off",
        better="low",
        hint="longer than the model reads",
    ),
    *_errors("mae", "MAE", "low"),
    *_errors("mse", "MSE", "low"),
    *_errors("bias", "bias", "neither"),
)
MAIN_METRICS = tuple(m for m in METRICS if m.key in {"acc1", "mean_recall@1"})
"""The main metric of a split: the first of these that it has."""

_PROBES = {"linear_probe": "Linear probe", "knn": "k-NN"}
_SHOT_KEY = re.compile(rf"({'|'.join(_PROBES)})_(\d{{1,6}})shot_acc1(_std)?")


def _probe(prefix: str, label: str) -> list[Metric]:
    return [
        Metric(key=f"{prefix}_acc1", label=f"{label} top-1", summary=True),
        Metric(key=f"{prefix}_acc5", label=f"{label} top-5"),
        Metric(key=f"{prefix}_mean_per_class_recall", label=f"{label} mean per-class recall"),
    ]


PROBE_METRICS = (
    *_probe("linear_probe", "Linear probe"),
    Metric(
        key="linear_probe_strength",
        label="Linear probe L2 strength",
        better="neither",
        percent=False,
    ),
    *_probe("knn", "k-NN"),
)
"""Metrics of `neuclip eval --probe`; evaluations in training have none of them."""


def shown_metrics(keys: Collection[str]) -> list[Metric]:
    """The metrics that tables may show, those of probes and of their few-shot results included.

    Args:
        keys: keys of all metrics at hand, which tell the numbers of few-shot samples.
    """
    found = {match for key in keys if (match := _SHOT_KEY.fullmatch(key))}
    few_shot = [
        Metric(
            key=match[0],
            label=f"{_PROBES[match[1]]} top-1, {match[2]} per class",
            hint="standard deviation" if match[3] else "",
            better="neither" if match[3] else "high",
        )
        for match in sorted(found, key=lambda m: (m[1] == "knn", int(m[2]), m[3] or ""))
    ]
    return [*METRICS, *PROBE_METRICS, *few_shot]


LOG_NORMALIZERS = ("log_normalizer", "batch_log_inner", "predicted_log_normalizer")
"""Keys of training records on log-normalizers: means over the last batch."""
