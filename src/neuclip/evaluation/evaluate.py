"""Evaluates a model on sets, one's own splits and DataComp's tasks alike, and writes the results.

Training, `--epochs 0` and `neuclip eval` all go through `evaluate_sets`.
"""

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip.evaluation.datacomp.sets import TaskSet
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.datacomp.task_evaluation import evaluate_task
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings, SetEvaluation
from neuclip.evaluation.outcomes import write_outcomes
from neuclip.evaluation.results import (
    EvalResult,
    Provenance,
    read_eval_results,
    write_gallery,
    write_result,
)
from neuclip.evaluation.split_evaluation import evaluate_split
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.evaluation.zero_shot import ClassVectors
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import RunFolder, outcomes_path

_log = logging.getLogger(__name__)

EvaluationSet = EvaluationSplit | TaskSet


@dataclass(frozen=True)
class FinishedSet:
    """A set with its result.

    Attributes:
        data: the set.
        number: position of the set, from 1.
        total: number of sets.
        result: the result.
        reused: whether the result was found in the results file.
    """

    data: EvaluationSet
    number: int
    total: int
    result: EvalResult
    reused: bool


def evaluate(
    model: EvaluatedModel,
    data: EvaluationSet,
    settings: EvaluationSettings,
    class_vectors: ClassVectors | None = None,
) -> SetEvaluation:
    """Evaluates a model on one set, by the rules of its kind. All ranks call it together.

    Args:
        model: the model.
        data: a split of one's own, or the set of a DataComp task.
        settings: how to evaluate.
        class_vectors: shared between sets with equal prompts; if none, computed.

    Raises:
        UserError: the set is corrupt, or contradicts itself.
    """
    class_vectors = class_vectors or ClassVectors(model.encoder, settings)
    if isinstance(data, TaskSet):
        return evaluate_task(model.encoder, data, settings, class_vectors)
    return evaluate_split(model, data, settings, class_vectors)


def evaluate_sets(
    model: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    settings: EvaluationSettings,
    results: Path,
    checkpoint: str | None = None,
) -> Generator[FinishedSet]:
    """Evaluates sets one by one; each result is written before the next set begins.

    All ranks iterate together; the main process writes.

    Args:
        model: the model.
        sets: the data.
        settings: how to evaluate.
        results: the results file, in the run's `eval_results/` if there are splits: their galleries
            and outcomes go there too. Results of other sets in the file are kept.
        checkpoint: SHA-256 of architecture and weights. With it, results of tasks carry their
            provenance, keep outcomes per sample, and are reused while nothing has changed. Without
            it they never replace such a result.

    Raises:
        UserError: a set is corrupt; the results before it are written.
    """
    earlier = from_main(lambda: _read(results))
    class_vectors = ClassVectors(model.encoder, settings)
    for number, data in enumerate(sets, start=1):
        before = earlier.get(data.key)
        made = _provenance(data, settings, checkpoint)
        reused = before is not None and _may_reuse(before, made, settings)
        if before is not None and reused:
            result = before
        else:
            evaluation = evaluate(model, data, settings, class_vectors)
            result = EvalResult(data.key, data.title, evaluation.metrics, made)
            if collectives.is_main():
                keep = before is not None and before.provenance is not None and made is None
                _write(results, data, None if keep else result, evaluation)
        yield FinishedSet(data, number, len(sets), result, reused)


def _read(results: Path) -> dict[str, EvalResult]:
    return {line.key: line for line in read_eval_results(results)} if results.exists() else {}


def _provenance(
    data: EvaluationSet, settings: EvaluationSettings, checkpoint: str | None
) -> Provenance | None:
    if checkpoint is None or not isinstance(data, TaskSet):
        return None
    return Provenance(load_suite().version, checkpoint, data.fingerprint, settings.precision)


def _may_reuse(before: EvalResult, made: Provenance | None, settings: EvaluationSettings) -> bool:
    if made is None or before.provenance != made:
        if made is not None and before.provenance and before.provenance.suite != made.suite:
            _log.warning(
                "%s: the result of suite %s is replaced, the suite is now %s",
                before.key, before.provenance.suite, made.suite,
            )  # fmt: skip
        return False
    return settings.allow_damage or "num_damaged" not in before.metrics


def _write(
    results: Path, data: EvaluationSet, result: EvalResult | None, evaluation: SetEvaluation
) -> None:
    """Writes outcomes and gallery, and then the result if there is one to write."""
    if isinstance(data, EvaluationSplit):
        folder = RunFolder(results.parents[1])
        if evaluation.outcomes is not None:
            write_outcomes(folder.split_outcomes(data.name), evaluation.outcomes)
        if evaluation.gallery is not None:
            write_gallery(folder.gallery(data.name), evaluation.gallery)
    elif result is not None and result.provenance is not None and evaluation.outcomes is not None:
        write_outcomes(outcomes_path(results, data.key), evaluation.outcomes)
    if result is not None:
        write_result(results, result)
