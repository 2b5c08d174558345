"""Many sets, one after the other: results are written at once, and reused if nothing changed."""

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip import distributed
from neuclip.errors import UserError
from neuclip.evaluation.benchmark import Benchmark, BenchmarkSettings
from neuclip.evaluation.outcomes import outcomes_path, write_outcomes
from neuclip.evaluation.results import EvalResult, Provenance, read_eval_results, write_result
from neuclip.evaluation.suite import Task, load_suite
from neuclip.evaluation.task_sets import TaskSet, open_task

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

    Several processes share the sets out; all of them return all results.

    Args:
        benchmark: The judge.
        sets: What to judge.
        checkpoint: SHA-256 of what is judged.
        results: The results file; lines of other tasks stay.
        tell: Called after each task, by the process that judged it.

    Returns:
        The results by key.

    Raises:
        UserError: a set is damaged; the results before it are written.
    """
    if distributed.is_main():
        _collect(results)
    distributed.barrier()
    old = {line.key: line for line in read_eval_results(results)} if results.exists() else {}
    wanted = {
        s.task.key: Provenance(
            load_suite().version, checkpoint, s.fingerprint, benchmark.settings.precision
        )
        for s in sets
    }
    settings = benchmark.settings
    to_do = [s for s in sets if not _may_reuse(old.get(s.task.key), wanted[s.task.key], settings)]
    mine = _share(to_do)
    part = _part(results)
    for number, task_set in enumerate(sets, start=1):
        task = task_set.task
        result = None if task_set in to_do else old[task.key]
        if task_set in mine:
            metrics = benchmark.judge(task_set)
            result = EvalResult(task.key, task.name, metrics, wanted[task.key])
            write_result(part, result)
            if benchmark.outcomes is not None:
                write_outcomes(outcomes_path(results, task.key), benchmark.outcomes)
        if result is not None and (task_set in mine or distributed.is_main()):
            tell(Progress(task, number, len(sets), task_set not in to_do, result))
    distributed.barrier()
    if distributed.is_main():
        _collect(results)
    distributed.barrier()
    return {line.key: line for line in read_eval_results(results) if line.key in wanted}


def _share(sets: Sequence[TaskSet]) -> list[TaskSet]:
    """This process's sets: the largest first, each to the process that has least to do."""
    loads = [0] * distributed.world_size()
    mine: list[TaskSet] = []
    for task_set in sorted(sets, key=lambda s: -len(s.index)):
        least = loads.index(min(loads))
        loads[least] += len(task_set.index)
        if least == distributed.rank():
            mine.append(task_set)
    return mine


def _part(results: Path) -> Path:
    """Where this process writes: with several, each has a file of its own until the end."""
    if not distributed.is_active():
        return results
    return results.with_name(f"{results.name}.part-{distributed.rank()}")


def _collect(results: Path) -> None:
    """Moves the results of all processes, or of killed ones, into the one file."""
    for part in sorted(results.parent.glob(f"{glob.escape(results.name)}.part-*")):
        for result in read_eval_results(part):
            write_result(results, result)
        part.unlink()


def open_sets(data_dir: Path, tasks: Sequence[Task]) -> list[TaskSet]:
    """Opens all sets, so that one that is missing is known before the first is judged.

    Raises:
        UserError: a set is missing or not complete.
    """
    if not data_dir.is_dir():
        raise UserError(f"no folder of evaluation sets at {data_dir}")
    return [open_task(data_dir, task) for task in tasks]


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
