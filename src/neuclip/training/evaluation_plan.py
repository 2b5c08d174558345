"""What a run evaluates: splits of one's own, canaries, benchmarks, and the metric it follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neuclip.config.run_config import RunConfig
from neuclip.config.sections import EvaluationConfig
from neuclip.errors import UserError, all_of
from neuclip.evaluation.datacomp.imagenet import IMAGENET_V2, IMAGENET_VAL, open_imagenet
from neuclip.evaluation.datacomp.sets import TaskSet, open_tasks
from neuclip.evaluation.datacomp.suite import Task, load_suite
from neuclip.evaluation.own_splits import open_own_splits
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.model.clip import imagenet_prompts
from neuclip.parallel.work_sharing import from_main
from neuclip.training.best_metric import BestMetric, choose_metric


@dataclass(frozen=True)
class EvaluationPlan:
    """What a run evaluates.

    Attributes:
        splits: evaluated every `val_frequency` epochs, canaries among them.
        zero_shot: task sets evaluated every `zeroshot_frequency` epochs.
        starts_trained: whether both towers start from weights in files; these are evaluated before
            the first step.
        best: the metric that chooses the best checkpoint, if there is one.
    """

    splits: Sequence[EvaluationSplit] = ()
    zero_shot: Sequence[TaskSet] = ()
    starts_trained: bool = False
    best: BestMetric | None = None


def open_plan(
    config: RunConfig, held_out: EvaluationSplit | None, *, starts_trained: bool
) -> EvaluationPlan:
    """Opens everything that a run evaluates.

    Args:
        config: the settings of the run.
        held_out: the share of the training data that is not trained on, if there is one.
        starts_trained: whether both towers start from weights in files.

    Raises:
        UserError: data cannot be opened, or the settings do not fit them.
    """
    evaluation = config.evaluation
    if evaluation.canary is not None and not starts_trained:
        raise UserError(
            f"--canary {evaluation.canary} shows what fine-tuning forgets: it needs starting "
            "weights of both towers (--pretrained); otherwise use --val-data"
        )
    splits = open_own_splits(evaluation, config.data, held_out)
    zero_shot = open_zero_shot(evaluation)
    followed = [
        *(splits if evaluation.val_frequency else []),
        *(zero_shot if evaluation.zeroshot_frequency else []),
    ]
    best = choose_metric(evaluation, followed)
    return EvaluationPlan(splits, zero_shot, starts_trained, best)


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
