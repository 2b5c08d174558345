"""Many sets, one after the other: results are written at once, and reused if nothing changed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip.errors import UserError
from neuclip.evaluation.datacomp.benchmark import Benchmark, BenchmarkSettings
from neuclip.evaluation.datacomp.sets import TaskSet, open_task
from neuclip.evaluation.datacomp.suite import Task, load_suite
from neuclip.evaluation.outcomes import write_outcomes
from neuclip.evaluation.results import EvalResult, Provenance, read_eval_results, write_result
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import outcomes_path

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A task that is finished.

    Attributes:
        task: Which one.
        number: Its place, from 1.
        total: How many there are.
        reused: The result was there already.
        result: What came out.
    """

    task: Task
    number: int
    total: int
    reused: bool
    result: EvalResult


def run_benchmark(
    benchmark: Benchmark,
    sets: Sequence[TaskSet],
    checkpoint: str,
    results: Path,
    tell: Callable[[Progress], None] = lambda _: None,
) -> dict[str, EvalResult]:
    """Judges sets, each as soon as the one before is written; finished ones are reused.

    Several processes share out the samples of every set; the first one writes.

    Args:
        benchmark: The judge.
        sets: What to judge.
        checkpoint: SHA-256 of what is judged.
        results: The results file; lines of other tasks stay.
        tell: Called after each task, by the first process.

    Returns:
        The results by key.

    Raises:
        UserError: a set is damaged; the results before it are written.
    """
    old = from_main(lambda: _read(results))
    main, found = collectives.is_main(), dict[str, EvalResult]()
    for number, task_set in enumerate(sets, start=1):
        task, before = task_set.task, old.get(task_set.task.key)
        made = Provenance(
            load_suite().version, checkpoint, task_set.fingerprint, benchmark.settings.precision
        )
        reused = _may_reuse(before, made, benchmark.settings)
        if reused and before is not None:
            result = before
        else:
            result = EvalResult(task.key, task.name, benchmark.judge(task_set), made)
            if main and benchmark.outcomes is not None:
                write_outcomes(outcomes_path(results, task.key), benchmark.outcomes)
            if main:
                write_result(results, result)
        found[task.key] = result
        if main:
            tell(Progress(task, number, len(sets), reused, result))
    return found


def _read(results: Path) -> dict[str, EvalResult]:
    return {line.key: line for line in read_eval_results(results)} if results.exists() else {}


def open_sets(data_dir: Path, tasks: Sequence[Task]) -> list[TaskSet]:
    """Opens all sets, so that one that is missing is known before the first is judged.

    The first process lists the shards for all of them.

    Raises:
        UserError: a set is missing or not complete.
    """
    if not data_dir.is_dir():
        raise UserError(f"no folder of evaluation sets at {data_dir}")
    return from_main(lambda: [open_task(data_dir, task) for task in tasks])


def main_scores(results: Path) -> dict[str, float]:
    """Main metric by key of the benchmark's lines of a file, to be averaged.

    Raises:
        UserError: lines of another version of the suite, or of several checkpoints or precisions.
    """
    suite = load_suite()
    lines = [line for line in read_eval_results(results) if line.provenance is not None]
    made: set[tuple[str, str]] = set()
    for line in lines:
        assert line.provenance is not None
        if line.provenance.suite != suite.version:
            raise UserError(
                f"{results}: the result of {line.key} is of suite {line.provenance.suite}, this "
                f"is {suite.version}: judge it again (neuclip eval does)"
            )
        made.add((line.provenance.checkpoint, line.provenance.precision))
    if len(made) > 1:
        raise UserError(f"{results}: the results are of several checkpoints or precisions")
    return {line.key: line.metrics["main_metric"] for line in lines}


def _may_reuse(
    before: EvalResult | None, provenance: Provenance, settings: BenchmarkSettings
) -> bool:
    if before is None:
        return False
    if before.provenance != provenance:
        if before.provenance is not None and before.provenance.suite != provenance.suite:
            _log.warning(
                "%s: the result of suite %s is judged anew with suite %s",
                before.key, before.provenance.suite, provenance.suite,
            )  # fmt: skip
        return False
    return settings.allow_damage or "num_damaged" not in before.metrics
