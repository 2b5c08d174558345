"""Flags of probes in `neuclip eval`. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from neuclip.cli.options import check_range
from neuclip.errors import UserError, nearest

if TYPE_CHECKING:
    from neuclip.config.data_sections import ReadingConfig
    from neuclip.data.progress import Progress
    from neuclip.evaluation.evaluate import EvaluationSet
    from neuclip.evaluation.probes import ProbeSettings
    from neuclip.evaluation.splits import EvaluationSplit

_KINDS = ("linear", "knn")


@dataclass(frozen=True, kw_only=True)
class ProbeFlags:
    """Which probes to train, on which data, and how."""

    probe: Annotated[
        str, arg(metavar="{linear,knn}[,...]", help_behavior_hint="(default: none)")
    ] = ""
    """train probes on the image features: logistic regression (linear), k nearest neighbours (knn),
    or both"""
    probe_data: Annotated[
        str | None,
        arg(metavar="DATA[::DATA]", help_behavior_hint="(default: train/ beside test/ of a set)"),
    ] = None
    """labelled data that probes are trained on, in a form of --train-data: with --label-key, class
    names beside shards, or a folder per class"""
    few_shot: Annotated[
        str,
        arg(metavar="K[,K]", aliases=("--fewshot-k",), help_behavior_hint="(default: none)"),
    ] = ""
    """also train probes on K samples of each class, such as 1,2,4,8,16"""
    few_shot_seeds: int = 3
    """draws of these samples"""
    val_proportion: float = 0.2
    """share of the training samples that chooses the L2 strength of the linear probe"""
    knn_k: int = 20
    """neighbours that vote"""
    knn_temperature: float = 0.07
    """temperature of their votes"""

    def check_probes(self) -> None:
        """Checks the flags before any work.

        Raises:
            UserError: one is out of range, or has no effect.
        """
        if not self.probe:
            own = [field for field in fields(ProbeFlags) if field.name != "probe"]
            for field in own:
                if getattr(self, field.name) != field.default:
                    flag = field.name.replace("_", "-")
                    raise UserError(f"--{flag} needs --probe linear, --probe knn or both")
            return
        self._kinds()
        shots = self._shots()
        if self.few_shot_seeds != ProbeFlags.few_shot_seeds and not shots:
            raise UserError("--few-shot-seeds needs --few-shot, the numbers of samples per class")
        check_range("few-shot-seeds", self.few_shot_seeds, ge=1)
        check_range("knn-k", self.knn_k, ge=1)
        check_range("knn-temperature", self.knn_temperature, gt=0)
        if not 0 < self.val_proportion < 1:
            raise UserError(
                f"--val-proportion: {self.val_proportion:g} is out of range; it must be > 0 and < 1"
            )

    def probe_settings(self) -> "ProbeSettings | None":
        """The flags as settings; none without `--probe`."""
        if not self.probe:
            return None
        from neuclip.evaluation.probes import ProbeSettings

        kinds = self._kinds()
        return ProbeSettings(
            kinds=tuple(kind for kind in ("linear", "knn") if kind in kinds),
            few_shot=self._shots(),
            few_shot_seeds=self.few_shot_seeds,
            held_out_share=self.val_proportion,
            neighbours=self.knn_k,
            temperature=self.knn_temperature,
        )

    def open_probe_data(
        self, reading: "ReadingConfig", progress: "Progress | None"
    ) -> "list[EvaluationSplit]":
        """The labelled data of `--probe-data`; nothing without it.

        Args:
            reading: how they are read.
            progress: called while shards are indexed.

        Raises:
            UserError: data cannot be opened, or have no labels.
        """
        from neuclip.evaluation.split_layouts import PROBE_TRAINING
        from neuclip.evaluation.splits import open_splits

        return open_splits(self.probe_data, reading, progress, PROBE_TRAINING)

    def unprobed(
        self, sets: "Sequence[EvaluationSet]", shared: "Sequence[EvaluationSplit]"
    ) -> list[str]:
        """Checks the data of probes before any image is read; a line for each set without probes.

        Args:
            sets: what is evaluated.
            shared: the data of `--probe-data`.

        Raises:
            UserError: no set can have probes, or they would be trained on samples that are
                evaluated, or on none of the classes.
        """
        from neuclip.evaluation.probe_samples import check_training_data, why_no_probes

        if not self.probe:
            return []
        reasons = [(data.title, why_no_probes(data, shared)) for data in sets]
        lines = [f"no probes on {title}: {reason}" for title, reason in reasons if reason]
        if len(lines) == len(reasons):
            more = f"\n(and {len(lines) - 5} more)" if len(lines) > 5 else ""
            raise UserError("\n".join([f"--probe {self.probe}: nothing to do", *lines[:5]]) + more)
        for data in sets:
            check_training_data(data, shared)
        return lines

    def _kinds(self) -> list[str]:
        given = [word.strip() for word in self.probe.split(",") if word.strip()]
        unknown = next((word for word in given if word not in _KINDS), None)
        if unknown is not None or not given:
            raise UserError(
                f"--probe {self.probe}: expected linear, knn or linear,knn; "
                f"{nearest(unknown or '', list(_KINDS))}"
            )
        return given

    def _shots(self) -> tuple[int, ...]:
        words = [word.strip() for word in self.few_shot.split(",") if word.strip()]
        if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
            raise UserError(
                f"--few-shot {self.few_shot}: expected numbers of samples per class, such as "
                "1,2,4,8,16"
            )
        return tuple(sorted({int(word) for word in words}))
