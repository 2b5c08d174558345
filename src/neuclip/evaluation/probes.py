"""Probes: classifiers on image features, trained on labelled data, beside zero-shot classification.

- `linear`: logistic regression; see `linear_probe`.
- `knn`: votes of the nearest training samples; see `nearest_neighbours`.

Features are the unit-norm embeddings that zero-shot classification compares, after the projection.
The classes are those of the evaluated set, so that the choice is among the same classes as
zero-shot; training samples of other classes are left out. All ranks encode, the main one fits.
"""

import functools
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.data.sources.source import content_digest
from neuclip.errors import UserError, printable, quantity
from neuclip.evaluation.class_draws import draw_shots, hold_out_by_class
from neuclip.evaluation.embed import encode_images, require_complete, start_reading
from neuclip.evaluation.interfaces import EncodedImages, EvaluationSettings, ImageTextEncoder
from neuclip.evaluation.linear_probe import (
    DEFAULT_STRENGTH,
    MAX_ITERATIONS,
    fit,
    sweep,
)
from neuclip.evaluation.metrics import Choices
from neuclip.evaluation.nearest_neighbours import NeighbourVotes
from neuclip.evaluation.probe_samples import (
    ProbedSet,
    ProbeSamples,
    training_data,
)
from neuclip.evaluation.ranking import Scores
from neuclip.evaluation.results import ProbeRecord
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.evaluation.zero_shot import Rules, check_classes, choose
from neuclip.parallel.work_sharing import from_main

ProbeKind = Literal["linear", "knn"]
PREFIXES: dict[ProbeKind, str] = {"linear": "linear_probe_", "knn": "knn_"}
"""What the keys of a probe's metrics begin with."""
_NAMES: dict[ProbeKind, str] = {"linear": "linear probe", "knn": "k-NN"}
_log = logging.getLogger(__name__)

Measure = Callable[[Choices], dict[str, float]]
"""The metrics of a classifier's choices."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Which probes to train, and how.

    Attributes:
        kinds: the probes.
        few_shot: also train on this many samples of each class, for each of these numbers.
        few_shot_seeds: draws of these samples: with the seeds 0, 1, ...
        held_out_share: share of the training samples of each class that chooses the strength of the
            linear probe.
        neighbours: k of k-NN.
        temperature: of the votes of k-NN.
        seed: chooses the samples that are held out of the full training data.
    """

    kinds: tuple[ProbeKind, ...]
    few_shot: tuple[int, ...] = ()
    few_shot_seeds: int = 3
    held_out_share: float = 0.2
    neighbours: int = 20
    temperature: float = 0.07
    seed: int = 0

    def words(self) -> str:
        """The settings that decide the results, in a line."""
        found = [f"seed {self.seed}"]
        if "linear" in self.kinds:
            found.append(f"linear held_out {self.held_out_share:g}")
        if "knn" in self.kinds:
            found.append(f"knn k {self.neighbours} temperature {self.temperature:g}")
        if self.few_shot:
            shots = ",".join(map(str, self.few_shot))
            found.append(f"few_shot {shots} seeds {self.few_shot_seeds}")
        return "; ".join(found)


class Probes:
    """Trains and evaluates probes, set by set. All ranks call it together.

    `check_training_data` finds before this what paths and class names tell.

    Args:
        encoder: the towers.
        settings: how to read and encode.
        probe: which probes, and how.
        shared: labelled data to train on for all sets, encoded once; nothing: each set's own
            training part.
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        settings: EvaluationSettings,
        probe: ProbeSettings,
        shared: Sequence[EvaluationSplit] = (),
    ) -> None:
        self._encoder, self._settings, self._probe = encoder, settings, probe
        self._shared = tuple(shared)
        self._encoded: list[EncodedImages] = []
        self._digest = functools.cache(content_digest)

    def record(self, data: ProbedSet) -> ProbeRecord | None:
        """The inputs of a set's probes; none if it has no classes or no training data."""
        parts = training_data(data, self._shared)
        if not parts:
            return None
        digest = "+".join(self._digest(part.index)[:16] for part in parts)
        return ProbeRecord(digest, self._probe.words())

    def metrics(
        self, data: ProbedSet, images: EncodedImages, rules: Rules, measure: Measure, main: str
    ) -> dict[str, float]:
        """The metrics of a set's probes by key; nothing if it has no classes or no training data.

        Args:
            data: the set.
            images: its encoded samples, all of which have a class.
            rules: which classes are right, and how ties count.
            measure: the metrics of a classifier's choices.
            main: key of the set's main metric, which few-shot results have besides accuracy.

        Raises:
            UserError: the training data are corrupt, or have none of the classes or only one of
                them.
        """
        parts = training_data(data, self._shared)
        if not parts:
            return {}
        encoded = self._encode_all(parts)
        samples = ProbeSamples.of(parts, encoded, data, images)

        def work() -> dict[str, float]:
            return _SetProbes(self._probe, self._settings, data, images, rules, samples).metrics(
                measure, {"acc1", "mean_per_class_recall", main}
            )

        return from_main(work)

    def _encode_all(self, parts: Sequence[EvaluationSplit]) -> list[EncodedImages]:
        if self._shared and self._encoded:
            return self._encoded
        found = [self._encode(part) for part in parts]
        if self._shared:
            self._encoded = found
        return found

    def _encode(self, part: EvaluationSplit) -> EncodedImages:
        allow_damage = self._settings.allow_damage or part.allow_damage
        try:
            if not allow_damage:
                require_complete(part.index.damage)
            batches = start_reading(self._encoder, part.index, self._settings, title=part.title)
            images = encode_images(self._encoder, batches, allow_damage=allow_damage)
            check_classes(images.with_class() if part.by_label else images, part.classnames)
        except UserError as error:
            raise UserError(f"training data of probes, {part.title}: {error}") from None
        return images


@dataclass(frozen=True)
class _Trained:
    """A classifier, facts of it by key, and how it was trained, in words."""

    score: Scores
    facts: dict[str, float]
    words: str


@dataclass(frozen=True)
class _SetProbes:
    """The probes of one set, on the main process."""

    probe: ProbeSettings
    settings: EvaluationSettings
    data: ProbedSet
    images: EncodedImages
    rules: Rules
    samples: ProbeSamples

    def metrics(self, measure: Measure, few_shot_keys: set[str]) -> dict[str, float]:
        """All metrics; what else is to be known is logged."""
        self._say_samples()
        found = self.samples.counts()
        for kind in self.probe.kinds:
            own = self._full(kind, measure)
            for shots in self.probe.few_shot:
                drawn = self._few_shot(kind, shots, measure, few_shot_keys)
                own |= {f"{shots}shot_{key}": value for key, value in drawn.items()}
            found |= {f"{PREFIXES[kind]}{key}": value for key, value in own.items()}
        return found

    def _full(self, kind: ProbeKind, measure: Measure) -> dict[str, float]:
        """The metrics of a probe that is trained on all samples, and facts of it."""
        everything = torch.arange(len(self.samples.classes))
        probe = self._train(kind, everything, self.probe.seed, "")
        self._say(kind, probe.words)
        return self._measured(probe, measure) | probe.facts

    def _few_shot(
        self, kind: ProbeKind, shots: int, measure: Measure, keys: set[str]
    ) -> dict[str, float]:
        """Mean and standard deviation over the draws, for some metrics."""
        values: dict[str, list[float]] = {}
        strengths: list[str] = []
        for seed in range(self.probe.few_shot_seeds):
            rows = draw_shots(self.samples.classes, shots, seed)
            probe = self._train(kind, rows, seed, f", {shots} a class, seed {seed}")
            if "strength" in probe.facts:
                strengths.append(f"{probe.facts['strength']:.3g}")
            for key, value in self._measured(probe, measure).items():
                if key in keys:
                    values.setdefault(key, []).append(value)
        if strengths:
            self._say(kind, f"{shots} a class: strength {', '.join(strengths)} by draw")
        found: dict[str, float] = {}
        for key, drawn in values.items():
            found[key] = statistics.fmean(drawn)
            if len(drawn) > 1:
                found[f"{key}_std"] = statistics.stdev(drawn)
        return found

    def _measured(self, probe: "_Trained", measure: Measure) -> dict[str, float]:
        return measure(choose(self.images, probe.score, self.data.classnames, self.rules))

    def _train(
        self, kind: ProbeKind, rows: Int64[Tensor, " rows"], seed: int, which: str
    ) -> "_Trained":
        features = self.samples.features[rows.to(self.samples.features.device)]
        classes = self.samples.classes[rows]
        if kind == "linear":
            return self._train_linear(features, classes, seed, which)
        k = min(self.probe.neighbours, len(classes))
        all_vote = f", all samples, fewer than {self.probe.neighbours}"
        temperature = self.probe.temperature
        votes = NeighbourVotes(features, classes, len(self.data.classnames), k, temperature)
        words = f"k {k}{all_vote if k < self.probe.neighbours else ''}"
        return _Trained(votes, {"k": float(k)}, words)

    def _train_linear(
        self,
        features: Float[Tensor, "rows dim"],
        classes: Int64[Tensor, " rows"],
        seed: int,
        which: str,
    ) -> "_Trained":
        number = len(self.data.classnames)
        halves = hold_out_by_class(classes, self.probe.held_out_share, seed)
        if not len(halves.held_out):
            fitted = fit(features, classes, number, DEFAULT_STRENGTH)
            words = f"strength {DEFAULT_STRENGTH:g}: no class has two samples to hold out one"
        else:
            progress = self.settings.reporting(f"{self.data.title}: linear probe{which}")
            found = sweep(features, classes, number, halves, progress)
            fitted = fit(features, classes, number, found.best.strength, found.best)
            end = ", an end of the range" if found.at_an_end else ""
            words = (
                f"strength {fitted.strength:.3g}{end}, the best of {len(found.tried)} on "
                f"{quantity(len(halves.held_out), 'held-out sample')} ({found.accuracy:.2%})"
            )
        if not fitted.converged:
            _log.warning(
                "%s: linear probe%s: L-BFGS did not converge in %d iterations, so the classifier "
                "is not the best of its strength",
                self.data.title, which, MAX_ITERATIONS,
            )  # fmt: skip
        facts = {"strength": fitted.strength, "iterations": float(fitted.iterations)}
        return _Trained(fitted, {**facts, "converged": float(fitted.converged)}, words)

    def _say(self, kind: ProbeKind, text: str) -> None:
        _log.info("%s: %s: %s", self.data.title, _NAMES[kind], text)

    def _say_samples(self) -> None:
        """Logs what the probes train on, what is left out, and which classes they cannot find."""
        samples, names = self.samples, self.data.classnames
        sizes = torch.bincount(samples.classes, minlength=len(names))
        sizes = sizes[sizes > 0]
        left_out = [
            f"{count:,} {why}"
            for count, why in (
                (samples.others, "of classes that are not evaluated"),
                (samples.unlabelled, "without a label"),
                (samples.damaged, "corrupt"),
            )
            if count
        ]
        _log.info(
            "%s: probes train on %s of %s, %s to %s a class%s", self.data.title,
            quantity(len(samples.classes), "sample"), quantity(len(sizes), "class"),
            f"{int(sizes.min()):,}", f"{int(sizes.max()):,}",
            f"; left out: {', '.join(left_out)}" if left_out else "",
        )  # fmt: skip
        for shots in self.probe.few_shot:
            fewer = int((sizes < shots).sum())
            if fewer:
                _log.info(
                    "%s: %s of %s have fewer than %s; all of them are taken",
                    self.data.title, f"{fewer:,}", quantity(len(sizes), "class"),
                    quantity(shots, "sample"),
                )  # fmt: skip
        if samples.untrained:
            shown = ", ".join(printable(names[number], 40) for number in [*samples.untrained][:3])
            _log.warning(
                "%s: %s of %s evaluated samples are of %s without a training sample (%s%s) "
                "and count as wrong", self.data.title,
                f"{sum(samples.untrained.values()):,}", f"{len(self.images):,}",
                quantity(len(samples.untrained), "class"),
                shown, ", ..." if len(samples.untrained) > 3 else "",
            )  # fmt: skip
