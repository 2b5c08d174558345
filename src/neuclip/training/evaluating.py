"""Evaluation during training: when, on which data, and where the results go.

All ranks evaluate together, each on its share of the samples.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from neuclip.config.run_config import RunConfig
from neuclip.config.sections import EvaluationConfig
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.benchmark import Benchmark, BenchmarkSettings
from neuclip.evaluation.datacomp.imagenet import IMAGENET_V2, IMAGENET_VAL, open_imagenet
from neuclip.evaluation.datacomp.sets import TaskSet
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.datacomp.suite_run import open_sets
from neuclip.evaluation.results import EvalResult, write_result
from neuclip.evaluation.split_evaluation import JudgeSettings, judge_split
from neuclip.evaluation.splits import EvaluationSplit, open_split
from neuclip.model.clip import imagenet_prompts
from neuclip.model.encoder import Encoder
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import RunFolder
from neuclip.training.components import Components
from neuclip.training.records.recorder import Recorder
from neuclip.training.records.sinks import read_records


def open_splits(val_data: str | None) -> list[EvaluationSplit]:
    """Opens the evaluation splits of `--val-data`, folders separated by '::'."""
    return [open_split(Path(part)) for part in val_data.split("::")] if val_data else []


def open_zero_shot(config: EvaluationConfig) -> list[TaskSet]:
    """Opens the sets evaluated every `--zeroshot-frequency` epochs; the main process lists files.

    Raises:
        UserError: a set is missing or incomplete, or a task is unknown.
    """
    sets: list[TaskSet] = []
    prompts = imagenet_prompts()
    for folder, task in ((config.imagenet_val, IMAGENET_VAL), (config.imagenet_v2, IMAGENET_V2)):
        if folder is not None:
            place = Path(folder)
            sets.append(
                from_main(lambda place=place, task=task: open_imagenet(place, task, *prompts))
            )
    if config.eval_tasks is not None and config.eval_data_dir is not None:
        keys = [word.strip() for word in config.eval_tasks.split(",") if word.strip()]
        if not keys:
            raise UserError("--eval-tasks is empty: name tasks such as imagenet1k,vtab/cifar100")
        sets += open_sets(Path(config.eval_data_dir), load_suite().select(keys))
    limit = config.eval_samples
    return sets if limit is None else [task_set.part(limit) for task_set in sets]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        encoder: the towers.
        loss: predicts log-normalizers; none: they are not evaluated.
        logit_scale: 1 / temperature.
        global_batch_size: pairs per training step.
    """

    encoder: Encoder
    loss: nn.Module | None = None
    logit_scale: float | None = None
    global_batch_size: int = 64


def evaluate_all(
    subject: Subject,
    splits: Sequence[EvaluationSplit],
    sets: Sequence[TaskSet],
    config: RunConfig,
    folder: Path,
) -> Generator[EvalResult]:
    """Evaluates splits and sets one by one, in training's precision.

    Sets with equal prompts share their class vectors. Galleries of the splits go to the run's
    `eval_results/`.

    Args:
        subject: the model.
        splits: for zero-shot classification, retrieval and log-normalizers.
        sets: for DataComp's metrics.
        config: the run's settings.
        folder: the run folder.

    Raises:
        UserError: a split or a set is corrupt.
    """
    batch_size, workers = config.evaluation.val_batch_size, config.data.workers
    settings = JudgeSettings(
        batch_size=batch_size,
        workers=workers,
        normalizer_batch_size=subject.global_batch_size,
        seed=config.seed,
    )
    for split in splits:
        metrics = judge_split(
            subject.encoder,
            split,
            settings,
            loss=subject.loss,
            logit_scale=subject.logit_scale,
            gallery=RunFolder(folder).gallery(split.name),
        )
        yield EvalResult(split.name, split.name, metrics)
    benchmark = Benchmark(
        subject.encoder, BenchmarkSettings(batch_size=batch_size, workers=workers)
    )
    for task_set in sets:
        yield EvalResult(task_set.key, task_set.task.name, benchmark.judge(task_set))


class Evaluator:
    """Evaluates the towers at the end of some epochs.

    Args:
        run: the components of the run.
        recorder: receives the results.
    """

    def __init__(self, run: Components, recorder: Recorder) -> None:
        self._run = run
        self._recorder = recorder

    def is_due(self, step: int) -> bool:
        """Whether the settings ask for an evaluation after a step."""
        splits, sets = self._due(step)
        return bool(splits or sets)

    def is_done(self, step: int) -> bool:
        """Whether the evaluation after a step was recorded before the run was interrupted."""
        records = read_records(self._run.folder.metrics)
        done = {r["split"] for r in records if r["kind"] == "eval" and r["step"] == step}
        splits, sets = self._due(step)
        return {split.name for split in splits} | {one.key for one in sets} <= done

    def evaluate(self, step: int) -> None:
        """Evaluates, writes `eval_results/` and records the metrics.

        The towers must be full and equal on all ranks.
        """
        run = self._run
        subject = Subject(
            Encoder(run.clip, run.device),
            run.loss,
            run.clip.logit_scale,
            run.loader.global_batch_size,
        )
        path = run.folder.results(step // run.loader.steps_per_epoch)
        for result in evaluate_all(subject, *self._due(step), run.config, run.folder.path):
            if collectives.is_main():
                write_result(path, result)
                self._recorder.evaluation(run.position(step), result.key, result.metrics)
        self._recorder.start_period()

    def _due(self, step: int) -> tuple[list[EvaluationSplit], list[TaskSet]]:
        """The splits and sets due after a step: at the end of some epochs, and of the last."""
        run, config = self._run, self._run.config.evaluation
        epoch, rest = divmod(step, run.loader.steps_per_epoch)

        def due(frequency: int) -> bool:
            at_end = epoch == run.last_epoch or (frequency and epoch % frequency == 0)
            return bool(frequency and epoch and not rest and at_end)

        return (
            run.splits if due(config.val_frequency) else [],
            run.zero_shot if due(config.zeroshot_frequency) else [],
        )
