"""Evaluates a DataComp task as DataComp does.

Classification: logits = 100 * image @ class vectors; the images in float32, the class vectors on
CUDA under float16 autocast. Retrieval and association: on CUDA both towers under autocast. On the
CPU everything is float32.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from neuclip.data.batch import Batch, Unreadable
from neuclip.errors import UserError, printable
from neuclip.evaluation.datacomp.sets import Instance, TaskSet
from neuclip.evaluation.datacomp.suite import SampleGroups, Task
from neuclip.evaluation.embed import (
    encode_both,
    encode_images,
    encode_texts,
    require_complete,
    start_reading,
)
from neuclip.evaluation.interfaces import (
    EncodedImages,
    EncodedSplit,
    EvaluationSettings,
    ImageTextEncoder,
    SetEvaluation,
)
from neuclip.evaluation.metrics import (
    Choices,
    accuracies,
    accuracy,
    group_accuracies,
    jaccard,
    macro_recall_and_f1,
    worst_group,
)
from neuclip.evaluation.outcomes import Outcomes, outcomes_of
from neuclip.evaluation.probes import Probes
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.zero_shot import DATACOMP_RULES, ClassVectors, classify
from neuclip.parallel import collectives
from neuclip.untrusted import DAMAGED_ARRAYS

_log = logging.getLogger(__name__)


def evaluate_task(
    encoder: ImageTextEncoder,
    task_set: TaskSet,
    settings: EvaluationSettings,
    class_vectors: ClassVectors,
    probes: Probes | None = None,
) -> SetEvaluation:
    """Evaluates a task's set. All ranks call it together and share the samples.

    Args:
        encoder: the towers, in float32.
        task_set: the data.
        settings: how to evaluate.
        class_vectors: computes class vectors, or has them.
        probes: trains probes for the set, if given and if it has classes.

    Returns:
        All metrics by DataComp's keys, `main_metric` again under that name, and the outcomes of the
        main metric.

    Raises:
        UserError: the set is corrupt, or contradicts itself.
    """
    task = task_set.task
    try:
        found = _evaluate(encoder, task_set, settings, class_vectors, probes)
    except UserError as error:
        raise UserError(f"{task.key}: {error}") from None
    if task.metric not in found.metrics:
        raise UserError(f"{task.key}: the set is too small for its main metric, {task.metric}")
    metrics = {**found.metrics, "main_metric": found.metrics[task.metric]}
    return SetEvaluation(metrics, found.outcomes)


def _evaluate(
    encoder: ImageTextEncoder,
    task_set: TaskSet,
    settings: EvaluationSettings,
    class_vectors: ClassVectors,
    probes: Probes | None,
) -> SetEvaluation:
    if not settings.allow_damage:
        require_complete(task_set.index.damage)
    if task_set.task.kind == "classification":
        batches = _start(encoder, task_set, settings)
        vectors = class_vectors(task_set.classnames, task_set.templates)  # while batches are read
        images = encode_images(encoder, batches, allow_damage=settings.allow_damage)
        choices = classify(images, vectors, task_set.classnames, DATACOMP_RULES)
        metrics = _classification_metrics(choices, images, task_set.task)
        outcomes = _outcomes(choices, images, task_set.task)
        if probes is not None:
            measure = partial(_classification_metrics, images=images, task=task_set.task)
            main = task_set.task.metric
            metrics |= probes.metrics(task_set, images, DATACOMP_RULES, measure, main)
    else:
        with settings.autocast():
            batches = _start(encoder, task_set, settings)
            if task_set.task.kind == "retrieval":
                images, pairs = encode_both(
                    encoder, batches, allow_damage=settings.allow_damage, distinct=False
                )
                metrics, outcomes = _retrieval(images, pairs)
            else:
                images = encode_images(encoder, batches, allow_damage=settings.allow_damage)
                metrics, outcomes = _association(
                    encoder, images, task_set.instances, settings.batch_size
                )
    metrics |= _counts(task_set, images)
    return SetEvaluation(metrics, outcomes, data=images.data_read(task_set.classes_digest))


def _start(
    encoder: ImageTextEncoder, task_set: TaskSet, settings: EvaluationSettings
) -> Iterator[Batch | Unreadable]:
    return start_reading(encoder, task_set.index, settings, task_set.positions, task_set.title)


def _classification_metrics(
    choices: Choices, images: EncodedImages, task: Task
) -> dict[str, float]:
    metrics = accuracies(choices)
    if task.metric == "F1-macro_all":
        recall, f1 = macro_recall_and_f1(choices)
        metrics |= {"acc_avg": metrics["acc1"], "recall-macro_all": recall, "F1-macro_all": f1}
    if task.groups is not None:
        metrics |= _grouped(choices, images, task.groups, task.metric)
    return metrics


def _retrieval(
    images: EncodedImages, pairs: EncodedSplit | None
) -> tuple[dict[str, float], Outcomes]:
    """Equal captions stay apart, as DataComp counts them."""
    without = [key for key, own in zip(images.keys, images.captions, strict=True) if not own]
    if without or pairs is None:
        raise UserError(f"the image {without[0]!r} has no caption (.txt)")
    found = retrieve(pairs, DATACOMP_RULES.ties)
    # The unit is an image with its captions, so that both recalls are means over units.
    right_images = torch.zeros(len(images), dtype=torch.double)
    right_images.index_add_(0, pairs.image_groups, found.right_images.double())
    both = found.right_texts.double() + right_images * (len(images) / len(pairs))
    return found.metrics(), outcomes_of("mean", both / 2)


def _association(
    encoder: ImageTextEncoder,
    images: EncodedImages,
    instances: Sequence[Instance],
    batch_size: int,
) -> tuple[dict[str, float], Outcomes]:
    place = {key: number for number, key in enumerate(images.keys)}
    texts = encode_texts(encoder, [_cue_prompt(one.cue) for one in instances], batch_size)
    scores: list[float] = []
    for instance, text in zip(instances, texts, strict=True):
        missing = [key for key in instance.candidates if key not in place]
        if missing:
            raise UserError(f"cue {instance.cue!r}: there is no image {missing[0]!r}")
        candidates = [place[key] for key in instance.candidates]
        similarity = images.image_features[candidates] @ text
        order = similarity.argsort(descending=True, stable=True)
        chosen = [candidates[i] for i in order[: len(instance.associations)].tolist()]
        scores.append(jaccard(chosen, [place[key] for key in instance.associations]))
    sizes = [len(instance.candidates) for instance in instances]
    main = [score for score, size in zip(scores, sizes, strict=True) if size >= 10]
    return _jaccard_scores(scores, sizes), outcomes_of("mean", torch.tensor(main))


def _counts(task_set: TaskSet, images: EncodedImages) -> dict[str, float]:
    """Numbers of samples; warns unless the set has its published size."""
    total = len(task_set.instances) or len(images)
    counts = {"num_samples": float(total)}
    if task_set.partial_of is not None:
        total = task_set.partial_of
        counts["partial_of"] = float(total)
    corrupt = len(images.damage) + len(task_set.index.damage)
    if corrupt:
        counts["num_damaged"] = float(corrupt)
    if total != task_set.task.size and collectives.is_main():
        _log.warning(
            "%s: %d samples, but the published set has %d",
            task_set.task.key, total, task_set.task.size,
        )  # fmt: skip
    return counts


def _grouped(
    choices: Choices, images: EncodedImages, groups: SampleGroups, metric: str
) -> dict[str, float]:
    """Accuracy and size of each group, and the accuracy of the worst.

    FMoW's definition ignores the region `Other`. DataComp's code looks for that name among groups
    that it names by number, never finds it, and counts the region.
    """
    right = choices.right_at(5 if groups.measure == "acc_top5" else 1)
    number = _column(images, groups.column)
    found = group_accuracies(right, number)
    metrics = {f"{groups.measure}_avg": accuracy(right)}
    for group, value in found.items():
        metrics[f"{groups.measure}_{groups.field}:{group}"] = value
        metrics[f"count_{groups.field}:{group}"] = float((number == group).sum())
    metrics[metric] = worst_group(found)
    if groups.ignored and not found.keys() <= set(groups.ignored):
        metrics[f"{metric}_as_defined"] = worst_group(found, groups.ignored)
    return metrics


def _outcomes(choices: Choices, images: EncodedImages, task: Task) -> Outcomes:
    """Outcomes per sample of the task's main metric."""
    if task.metric == "F1-macro_all":
        return outcomes_of("macro_f1", choices.chosen, choices.target)
    if task.groups is None:
        by_class = task.metric == "mean_per_class_recall"
        statistic = "mean_of_groups" if by_class else "mean"
        return outcomes_of(statistic, choices.right_at(1), choices.target if by_class else None)
    group = _column(images, task.groups.column)
    right = choices.right_at(5 if task.groups.measure == "acc_top5" else 1)
    return outcomes_of("worst_group", right, group)


def _column(images: EncodedImages, column: int) -> Int64[Tensor, " samples"]:
    """A column of the metadata.

    Raises:
        UserError: a sample has no metadata, or its metadata has no such column.
    """
    values: list[int] = []
    for key, content in zip(images.keys, images.metadata, strict=True):
        if content is None:
            raise UserError(f"sample {key!r} has no metadata (.npy), which this task groups by")
        try:
            row = np.load(io.BytesIO(content), allow_pickle=False)
            values.append(int(row[column]))
        except DAMAGED_ARRAYS as error:
            raise UserError(
                f"sample {printable(key)!r}: its metadata (.npy) is not an array of numbers with a "
                f"column {column}: {printable(str(error))}"
            ) from None
    return torch.tensor(values, dtype=torch.int64)


def _cue_prompt(cue: str) -> str:
    """The prompt of WinoGAViL's authors."""
    word = cue.lower()
    return f"{'An' if word[0] in 'aeiou' else 'A'} {word}"


def _jaccard_scores(scores: list[float], candidates: list[int]) -> dict[str, float]:
    """Mean scores by number of candidates; the main metric is the mean for 10 to 12."""
    means = {"avg_jaccard_score": scores}
    ranges = [(5, 5), (6, 6), (10, 10), (12, 12), (0, 6), (10, 99)]
    names = ["5", "6", "10", "12", "5-6", "10-12"]
    for name, (low, high) in zip(names, ranges, strict=True):
        of_size = [s for s, n in zip(scores, candidates, strict=True) if low <= n <= high]
        means[f"jaccard_score_{name}"] = of_size
    return {name: sum(values) / len(values) for name, values in means.items() if values}
