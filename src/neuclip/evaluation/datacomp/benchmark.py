"""The benchmark's tasks judged as DataComp does, with towers that are loaded once.

Classification: logits = 100 * image @ class vectors; the images in float32, the class vectors on
CUDA under float16 autocast. Retrieval and association: on CUDA both towers under autocast. On the
CPU all is float32.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.data.batch import Batch, Unreadable
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.sets import Instance, TaskSet
from neuclip.evaluation.datacomp.suite import Groups, Task
from neuclip.evaluation.embed import encode_images, encode_texts, require_whole, start_reading
from neuclip.evaluation.interfaces import EncodedImages, EncodedSplit, ImageTextEncoder
from neuclip.evaluation.metrics import (
    Choices,
    accuracy,
    group_accuracies,
    jaccard,
    macro_recall_and_f1,
    mean_per_class_recall,
    worst_group,
)
from neuclip.evaluation.outcomes import Outcomes, outcomes_of
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.zero_shot import choose_classes, class_vectors
from neuclip.parallel import collectives

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """How to judge.

    Attributes:
        batch_size: Pictures, and texts, per forward pass.
        workers: Reading processes.
        amp: Kind of device on which to autocast where the benchmark does; none: float32.
        allow_damage: Judge what is left of a damaged set, and count what is not.
    """

    batch_size: int = 256
    workers: int = 2
    amp: Literal["cuda", "cpu"] | None = None
    allow_damage: bool = False

    @property
    def precision(self) -> str:
        """Name of the arithmetic, for the results."""
        return "fp32" if self.amp is None else "amp"


class Benchmark:
    """Judges sets; class vectors of equal names and prompts are computed once.

    Several processes share out the samples of every set; all call it together, and get one answer.

    Args:
        encoder: The towers, in float32.
        settings: How to judge.
    """

    def __init__(self, encoder: ImageTextEncoder, settings: BenchmarkSettings) -> None:
        self.settings = settings
        self._encoder = encoder
        self._vectors: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
        self.outcomes: Outcomes | None = None
        """Of the samples of the set that was judged last."""

    def judge(self, task_set: TaskSet) -> dict[str, float]:
        """All metrics of a set by the benchmark's names; `main_metric` repeats the main one.

        Raises:
            UserError: the set is damaged, or contradicts itself.
        """
        task = task_set.task
        try:
            metrics = self._judge(task_set)
        except UserError as error:
            raise UserError(f"{task.key}: {error}") from None
        if task.metric not in metrics:
            raise UserError(f"{task.key}: the set is too small for its main metric, {task.metric}")
        return {**metrics, "main_metric": metrics[task.metric]}

    def _judge(self, task_set: TaskSet) -> dict[str, float]:
        if not self.settings.allow_damage:
            require_whole(task_set.index.damage)
        if task_set.task.kind == "classification":
            return self._classification(task_set)
        with self._autocast():
            images = self._encode(self._start(task_set))
            if task_set.task.kind == "retrieval":
                return self._retrieval(images) | _counts(task_set, images)
            return self._association(images, task_set.instances) | _counts(task_set, images)

    def _classification(self, task_set: TaskSet) -> dict[str, float]:
        batches = self._start(task_set)
        names = task_set.classnames
        vectors = self._class_vectors(names, task_set.templates)  # while the first are read
        images = self._encode(batches)
        choices = choose_classes(images, vectors, names)
        right = choices.right_at(1)
        metrics = {"acc1": accuracy(right)}
        if len(names) >= 5:
            metrics["acc5"] = accuracy(choices.right_at(5))
        metrics["mean_per_class_recall"] = mean_per_class_recall(right, choices.target)
        recall, f1 = macro_recall_and_f1(choices)
        if task_set.task.metric == "F1-macro_all":
            metrics |= {"acc_avg": metrics["acc1"], "recall-macro_all": recall, "F1-macro_all": f1}
        if task_set.task.groups is not None:
            metrics |= _grouped(choices, images, task_set.task.groups, task_set.task.metric)
        self.outcomes = _outcomes(choices, images, task_set.task)
        return metrics | _counts(task_set, images)

    def _retrieval(self, images: EncodedImages) -> dict[str, float]:
        captions: list[str] = []
        owners: list[int] = []
        for picture, text in enumerate(images.captions):
            own = [line.strip() for line in text.splitlines() if line.strip()]
            if not own:
                raise UserError(f"the picture {images.keys[picture]!r} has no caption (.txt)")
            captions += own
            owners += [picture] * len(own)
        owner = torch.tensor(owners)
        # A row for each caption; equal captions stay apart, as the benchmark counts them.
        pairs = EncodedSplit(
            image_features=images.image_features[owner],
            text_features=encode_texts(self._encoder, captions, self.settings.batch_size),
            sample_ids=images.sample_ids[owner],
            class_indices=images.class_indices[owner],
            captions=captions,
            keys=[images.keys[picture] for picture in owners],
            image_groups=owner,
            text_groups=torch.arange(len(captions)),
        )
        found = retrieve(pairs, ties="first")
        # A unit is a picture with its captions: both recalls are then means over units.
        own = torch.zeros(len(images), dtype=torch.double)
        own.index_add_(0, owner, found.right_images.double())
        both = found.right_texts.double() + own * (len(images) / len(captions))
        self.outcomes = outcomes_of("mean", both / 2)
        return found.metrics()

    def _association(
        self, images: EncodedImages, instances: Sequence[Instance]
    ) -> dict[str, float]:
        place = {key: number for number, key in enumerate(images.keys)}
        cues = [_cue_prompt(instance.cue) for instance in instances]
        texts = encode_texts(self._encoder, cues, self.settings.batch_size)
        scores: list[float] = []
        for instance, text in zip(instances, texts, strict=True):
            missing = [key for key in instance.candidates if key not in place]
            if missing:
                raise UserError(f"cue {instance.cue!r}: there is no picture {missing[0]!r}")
            candidates = [place[key] for key in instance.candidates]
            similarity = images.image_features[candidates] @ text
            order = similarity.argsort(descending=True, stable=True)
            chosen = [candidates[i] for i in order[: len(instance.associations)].tolist()]
            scores.append(jaccard(chosen, [place[key] for key in instance.associations]))
        sizes = [len(instance.candidates) for instance in instances]
        main = [score for score, size in zip(scores, sizes, strict=True) if size >= 10]
        self.outcomes = outcomes_of("mean", torch.tensor(main))
        return _jaccard_scores(scores, sizes)

    def _start(self, task_set: TaskSet) -> Iterator[Batch | Unreadable]:
        settings = self.settings
        return start_reading(
            self._encoder,
            task_set.index,
            settings.batch_size,
            settings.workers,
            task_set.positions,
        )

    def _encode(self, batches: Iterator[Batch | Unreadable]) -> EncodedImages:
        return encode_images(self._encoder, batches, allow_damage=self.settings.allow_damage)

    def _class_vectors(
        self, classnames: list[str], templates: list[str]
    ) -> Float[Tensor, "classes dim"]:
        key = tuple(classnames), tuple(templates)
        if key not in self._vectors:
            with self._autocast():
                self._vectors[key] = class_vectors(
                    self._encoder, classnames, templates, self.settings.batch_size
                )
        return self._vectors[key]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.amp is None:
            return nullcontext()
        dtype = torch.float16 if self.settings.amp == "cuda" else torch.bfloat16
        return torch.autocast(self.settings.amp, dtype=dtype)


def _counts(task_set: TaskSet, images: EncodedImages) -> dict[str, float]:
    """Number of samples; it should be the published set's, and all of them whole."""
    whole = len(task_set.instances) or len(images)
    counts = {"num_samples": float(whole)}
    if task_set.partial_of is not None:
        whole = task_set.partial_of
        counts["partial_of"] = float(whole)
    damaged = len(images.damage) + len(task_set.index.damage)
    if damaged:
        counts["num_damaged"] = float(damaged)
    if whole != task_set.task.size and collectives.is_main():
        _log.warning(
            "%s: %d samples, but the published set has %d",
            task_set.task.key, whole, task_set.task.size,
        )  # fmt: skip
    return counts


def _grouped(
    choices: Choices, images: EncodedImages, groups: Groups, metric: str
) -> dict[str, float]:
    """Accuracy and size of every group, and the worst group's."""
    right = choices.right_at(5 if groups.measure == "acc_top5" else 1)
    number = _column(images, groups.column)
    found = group_accuracies(right, number)
    metrics = {f"{groups.measure}_avg": accuracy(right)}
    for group, value in found.items():
        metrics[f"{groups.measure}_{groups.field}:{group}"] = value
        metrics[f"count_{groups.field}:{group}"] = float((number == group).sum())
    if groups.left_out:
        metrics[f"{metric}_of_all"] = worst_group(found)
    try:
        return metrics | {metric: worst_group(found, groups.left_out)}
    except ValueError as error:
        raise UserError(str(error)) from None


def _outcomes(choices: Choices, images: EncodedImages, task: Task) -> Outcomes:
    """What the task's main metric makes of each sample."""
    if task.metric == "F1-macro_all":
        return outcomes_of("macro_f1", choices.chosen, choices.target)
    if task.groups is None:
        by_class = task.metric == "mean_per_class_recall"
        statistic = "mean_of_groups" if by_class else "mean"
        return outcomes_of(statistic, choices.right_at(1), choices.target if by_class else None)
    group = _column(images, task.groups.column)
    right = choices.right_at(5 if task.groups.measure == "acc_top5" else 1)
    counts = torch.tensor([number not in task.groups.left_out for number in group.tolist()])
    return outcomes_of("worst_group", right[counts], group[counts])


def _column(images: EncodedImages, column: int) -> Int64[Tensor, " samples"]:
    """A column of the metadata.

    Raises:
        UserError: a sample has no metadata, or it is no array with such a column.
    """
    values: list[int] = []
    for key, content in zip(images.keys, images.metadata, strict=True):
        if content is None:
            raise UserError(f"sample {key!r} has no metadata (.npy), which this task groups by")
        try:
            row = np.load(io.BytesIO(content), allow_pickle=False)
            values.append(int(row[column]))
        except (ValueError, IndexError, EOFError, TypeError) as error:
            raise UserError(
                f"sample {key!r}: its metadata (.npy) is no array of numbers with a column "
                f"{column}: {error}"
            ) from None
    return torch.tensor(values, dtype=torch.int64)


def _cue_prompt(cue: str) -> str:
    """The prompt that WinoGAViL's authors give to CLIP."""
    word = cue.lower()
    return f"{'An' if word[0] in 'aeiou' else 'A'} {word}"


def _jaccard_scores(scores: list[float], candidates: list[int]) -> dict[str, float]:
    """Means by number of candidates; the main one is that of 10 to 12."""
    means = {"avg_jaccard_score": scores}
    ranges = [(5, 5), (6, 6), (10, 10), (12, 12), (0, 6), (10, 99)]
    names = ["5", "6", "10", "12", "5-6", "10-12"]
    for name, (low, high) in zip(names, ranges, strict=True):
        of_size = [s for s, n in zip(scores, candidates, strict=True) if low <= n <= high]
        means[f"jaccard_score_{name}"] = of_size
    return {name: sum(values) / len(values) for name, values in means.items() if values}
