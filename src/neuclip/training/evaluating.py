"""Evaluation during training: when, on which data, and where the results go.

All ranks evaluate together, each on its share of the samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from neuclip.config.run_config import RunConfig
from neuclip.config.sections import EvaluationConfig
from neuclip.errors import UserError, all_of
from neuclip.evaluation.datacomp.imagenet import IMAGENET_V2, IMAGENET_VAL, open_imagenet
from neuclip.evaluation.datacomp.sets import TaskSet, open_tasks
from neuclip.evaluation.datacomp.suite import Task, load_suite
from neuclip.evaluation.evaluate import EvaluationSet, evaluate_sets
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.model.clip import imagenet_prompts
from neuclip.model.encoder import Encoder
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import read_records
from neuclip.training.components import Components
from neuclip.training.records.recorder import Recorder


def open_zero_shot(config: EvaluationConfig) -> list[TaskSet]:
    """Opens the sets evaluated every `--zeroshot-frequency` epochs; the main process lists files.

    Raises:
        UserError: sets are missing or incomplete, or a task is unknown; names all problems.
    """
    prompts = imagenet_prompts()

    def imagenet(folder: str, task: Task) -> list[TaskSet]:
        return [from_main(lambda: open_imagenet(Path(folder), task, *prompts))]

    openers = [
        partial(imagenet, folder, task)
        for folder, task in (
            (config.imagenet_val, IMAGENET_VAL),
            (config.imagenet_v2, IMAGENET_V2),
        )
        if folder is not None
    ]
    if config.eval_tasks is not None and config.eval_data_dir is not None:
        openers.append(partial(_tasks, config.eval_tasks, Path(config.eval_data_dir)))
    sets = [task_set for some in all_of(openers) for task_set in some]
    limit = config.eval_samples
    return sets if limit is None else [task_set.part(limit) for task_set in sets]


def _tasks(tasks: str, data_dir: Path) -> list[TaskSet]:
    keys = [word.strip() for word in tasks.split(",") if word.strip()]
    if not keys:
        raise UserError("--eval-tasks is empty: name tasks such as imagenet1k,vtab/cifar100")
    return open_tasks(data_dir, load_suite().select(keys))


def evaluation_settings(config: RunConfig) -> EvaluationSettings:
    """How a run evaluates: in training's precision."""
    return EvaluationSettings(
        batch_size=config.evaluation.val_batch_size,
        workers=config.data.workers,
        stall_limit=config.data.data_timeout,
        seed=config.seed,
    )


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
        return bool(self._due(step))

    def is_done(self, step: int) -> bool:
        """Whether the evaluation after a step was recorded before the run was interrupted."""
        records = read_records(self._run.folder.metrics)
        done = {r.get("split") for r in records if r.get("kind") == "eval" and r["step"] == step}
        return {one.key for one in self._due(step)} <= done

    def evaluate(self, step: int, between_sets: Callable[[], None]) -> None:
        """Evaluates, writes `eval_results/` and records the metrics.

        The towers must be full and equal on all ranks.

        Args:
            step: steps done.
            between_sets: called on all ranks after each set; an error that it raises ends the
                evaluation.
        """
        run = self._run
        model = EvaluatedModel(
            Encoder(run.clip, run.device),
            run.loss,
            run.clip.logit_scale,
            run.loader.global_batch_size,
        )
        settings = evaluation_settings(run.config)
        results = run.folder.results(step // run.loader.steps_per_epoch)
        for done in evaluate_sets(model, self._due(step), settings, results):
            self._recorder.evaluation(run.position(step), done.data.key, done.result)
            between_sets()
        self._recorder.start_period()

    def _due(self, step: int) -> Sequence[EvaluationSet]:
        """The sets due after a step: at the end of some epochs, and of the last."""
        run, config = self._run, self._run.config.evaluation
        epoch, rest = divmod(step, run.loader.steps_per_epoch)

        def due(frequency: int) -> bool:
            at_end = epoch == run.last_epoch or (frequency and epoch % frequency == 0)
            return bool(frequency and epoch and not rest and at_end)

        return [
            *(run.splits if due(config.val_frequency) else []),
            *(run.zero_shot if due(config.zeroshot_frequency) else []),
        ]
