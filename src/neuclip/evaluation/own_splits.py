"""The splits of a run: the held-out share, `--val-data` and the canaries, with their prompts."""

from dataclasses import replace

from neuclip.config.data_sections import ReadingConfig
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import EvaluationConfig
from neuclip.data.opening import open_source
from neuclip.data.progress import Progress
from neuclip.errors import UserError
from neuclip.evaluation.held_out import hold_out
from neuclip.evaluation.split_layouts import EVALUATION, Purpose
from neuclip.evaluation.splits import (
    EvaluationSplit,
    open_splits,
    require_label_classes,
    with_templates,
)
from neuclip.run_folder import CANARY


def open_own_splits(
    evaluation: EvaluationConfig,
    reading: ReadingConfig,
    held_out: EvaluationSplit | None,
    progress: Progress | None = None,
    purpose: Purpose = EVALUATION,
) -> list[EvaluationSplit]:
    """Opens the splits of a run.

    Args:
        evaluation: names the data.
        reading: how they are read.
        held_out: the share of the training data that is not trained on, if there is one.
        progress: called while shards are indexed.
        purpose: what they are opened for.

    Raises:
        UserError: data cannot be opened, or two splits have one name.
    """
    splits = open_splits(evaluation.val_data, reading, progress, purpose)
    if held_out is not None:
        if any(split.name == held_out.name for split in splits):
            raise UserError(
                f"--val-data and --val-split both have a split {held_out.name}: rename the folder "
                "of --val-data, or leave one out"
            )
        splits = [held_out, *splits]
    canaries = open_splits(evaluation.canary, reading, progress)
    splits += [replace(each, name=CANARY + each.name) for each in canaries]
    if not purpose.training:  # labels may be of the data that probes are trained on
        require_label_classes(splits, reading)
    return with_templates(splits, evaluation.val_templates)


def reopen_own_splits(
    config: RunConfig,
    reading: ReadingConfig,
    progress: Progress | None = None,
    purpose: Purpose = EVALUATION,
) -> list[EvaluationSplit]:
    """Opens the splits that a run was trained with.

    Args:
        config: the settings of the run.
        reading: how the data are read now.
        progress: called while shards are indexed.
        purpose: what they are opened for.

    Raises:
        UserError: data cannot be opened; the held-out share needs the training data.
    """
    share, held_out = config.evaluation.val_split, None
    if share is not None and config.data.train_data is not None:
        source = open_source(config.data.train_data, reading, progress)
        held = hold_out(source, reading, share, config.seed, progress)
        held_out = held.probed_split if purpose.training else held.split
    return open_own_splits(config.evaluation, reading, held_out, progress, purpose)
