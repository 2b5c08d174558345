"""Evaluates a model on sets, one's own splits and DataComp's tasks alike, and writes the results.

Training, `--epochs 0` and `neuclip eval` all go through `evaluate_sets`.
"""

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuclip.evaluation.datacomp.sets import TaskSet
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.datacomp.task_evaluation import evaluate_task
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings, SetEvaluation
from neuclip.evaluation.outcomes import write_outcomes
from neuclip.evaluation.probes import Probes
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
from neuclip.files import locked
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import gallery_in, outcomes_path, split_outcomes_in

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
    probes: Probes | None = None,
) -> SetEvaluation:
    """Evaluates a model on one set, by the rules of its kind. All ranks call it together.

    Args:
        model: the model.
        data: a split of one's own, or the set of a DataComp task.
        settings: how to evaluate.
        class_vectors: shared between sets with equal prompts; if none, computed.
        probes: trains probes for sets with classes; none: no probes.

    Raises:
        UserError: the set is corrupt, or contradicts itself.
    """
    class_vectors = class_vectors or ClassVectors(model.encoder, settings)
    if isinstance(data, TaskSet):
        return evaluate_task(model.encoder, data, settings, class_vectors, probes)
    return evaluate_split(model, data, settings, class_vectors, probes)


def evaluate_sets(
    model: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    settings: EvaluationSettings,
    results: Path,
    checkpoint: str | None = None,
    probes: Probes | None = None,
) -> Generator[FinishedSet]:
    """Evaluates sets one by one; each result is written before the next set begins.

    All ranks iterate together; the main process writes.

    Args:
        model: the model.
        sets: the data.
        settings: how to evaluate.
        results: the results file; nothing is evaluated if it cannot be written. Galleries and
            outcomes go to its folder. Results of other sets in the file are kept, also those of a
            split of the same name with other data.
        checkpoint: SHA-256 of architecture and weights. With it, results of tasks carry their
            provenance, keep outcomes per sample, and are reused while nothing has changed. Without
            it they never replace such a result.
        probes: trains probes for sets with classes; none: no probes. A result with other probes, or
            without them, is then not reused.

    Raises:
        UserError: a set is corrupt; the results before it are written.
    """
    earlier = from_main(lambda: _prepare(results))
    class_vectors = ClassVectors(model.encoder, settings)
    for number, data in enumerate(sets, start=1):
        before = earlier.get(data.key)
        made = _provenance(data, settings, checkpoint)
        record = None if probes is None else probes.record(data)
        reused = (
            before is not None
            and _may_reuse(before, made, settings)
            and record in (None, before.probe)
        )
        if before is not None and reused:
            result = before
        else:
            evaluation = evaluate(model, data, settings, class_vectors, probes)
            result = EvalResult(
                data.key, data.title, evaluation.metrics, made, evaluation.data, record
            )
            if collectives.is_main():
                if before is not None and before.probe is not None and record is None:
                    _log.warning("%s: its results of probes are replaced", data.key)
                keep = before is not None and before.provenance is not None and made is None
                result = _write(results, data, result, evaluation, keep=keep)
        yield FinishedSet(data, number, len(sets), result, reused)


def _prepare(results: Path) -> dict[str, EvalResult]:
    """The results in the file by key; raises `UserError` if the file cannot be written."""
    with locked(results):
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
    results: Path, data: EvaluationSet, result: EvalResult, evaluation: SetEvaluation, *, keep: bool
) -> EvalResult:
    """Writes the result, unless an earlier one is kept, and then outcomes and gallery.

    Returns:
        The result with its key in the file.
    """
    if not keep:
        result = write_result(results, result)
    if isinstance(data, EvaluationSplit):
        folder = results.parent
        if evaluation.outcomes is not None:
            write_outcomes(split_outcomes_in(folder, result.key), evaluation.outcomes)
        if evaluation.gallery is not None:
            gallery = replace(evaluation.gallery, split=result.key)
            write_gallery(gallery_in(folder, result.key), gallery)
    elif not keep and result.provenance is not None and evaluation.outcomes is not None:
        write_outcomes(outcomes_path(results, data.key), evaluation.outcomes)
    return result
