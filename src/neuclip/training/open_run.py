"""Starts a run folder, or finds the checkpoint to resume from."""

import logging
from collections.abc import Mapping
from pathlib import Path

from neuclip.checkpoint.common import checkpoints_in
from neuclip.checkpoint.storage import VerifiedCheckpoint, furthest_complete, verify
from neuclip.config.recipes import read_yaml
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.files import describe
from neuclip.masking import mask_tree
from neuclip.parallel.folder_lock import FolderLock
from neuclip.run_folder import RunFolder, read_records

log = logging.getLogger("neuclip")


def open_run_folder(
    logs: str, name: str, resume: str | None, lock: FolderLock
) -> tuple[RunFolder, VerifiedCheckpoint | None]:
    """Makes the folder of a new run, or finds the checkpoint to resume from.

    One rank calls this and sends the result to the others, so that a checkpoint is hashed once.

    Args:
        logs: the folder of all runs.
        name: of the run.
        resume: a checkpoint; `latest` or `auto` (the complete one that went furthest) of this run;
            none: start a new run.
        lock: acquired for the run folder.

    Returns:
        The run folder, and the checkpoint to resume from (none: start at step 0).

    Raises:
        UserError: the folder holds a run and `resume` is not set, is in use, or is not writable; or
            the checkpoint is missing or corrupt.
    """
    folder = run_folder(logs, name)
    checkpoint = None if resume in {None, "latest", "auto"} else verify(Path(str(resume)))
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder.path}: {describe(error)}; choose another --logs"
        ) from None
    lock.acquire(folder.path)
    _check_new(folder, resume)
    if resume in {"latest", "auto"}:
        if resume == "auto":
            checkpoint = furthest_complete(folder.checkpoints)
        elif folder.latest.exists():
            checkpoint = verify(folder.latest)
        if checkpoint is None:
            log.info("nothing to resume in %s: starting a new run", folder.path)
    return folder, checkpoint


def run_folder(logs: str, name: str) -> RunFolder:
    """The folder of a run.

    Raises:
        UserError: the name cannot be that of a folder.
    """
    if "\0" in name or len(name.encode(errors="surrogateescape")) > 200:
        raise UserError(f"--name {name[:40]!r} cannot be the name of a folder: at most 200 bytes")
    return RunFolder(Path(logs) / name)


def _check_new(folder: RunFolder, resume: str | None) -> None:
    """Checks that a new run replaces nothing but what a failure before step 1 leaves.

    Raises:
        UserError: the folder holds the work of a run.
    """
    work = checkpoints_in(folder.checkpoints) or read_records(folder.metrics)
    if resume is None and (work or any(folder.eval_results.glob("*"))):
        raise UserError(
            f"{folder.path} already holds a run; continue it with --resume auto, or choose "
            "another --name"
        )


CONTINUED = (
    "method", "optim", "model", "adaptation", "supervision", "compute", "data", "evaluation",
    "output",
)  # fmt: skip
"""Sections whose changes are reported when a run is continued."""
_SAME_RESULT = {
    "train_data", "data_format", "batch_size", "accum_freq", "workers", "data_timeout", "cache_dir",
    "cache_size_gb", "allow_pipe", "val_batch_size", "logs",
}  # fmt: skip
"""Settings in them that change no number and no file: where data lie, and how they are read and
shared out. What the data hold is compared by the checkpoint."""


def changed_settings(before: RunConfig, now: RunConfig) -> str:
    """What a continued run does in another way than before: `gamma 0.4 -> 0.2, ...`, or nothing.

    Args:
        before: the settings that the run recorded.
        now: the settings that it continues with, resolved.
    """
    old, new = (mask_tree(each.model_dump(mode="json")) for each in (before, now))
    pairs = [(section, key) for section in CONTINUED for key in new[section]]
    changes = [
        f"{key} {_text(old[section][key])} -> {_text(new[section][key])}"
        for section, key in pairs
        if key not in _SAME_RESULT
        and key in old[section]
        and old[section][key] != new[section][key]
    ]
    if before.seed != now.seed:
        changes.append(f"seed {before.seed} -> {now.seed}")
    return ", ".join(changes)


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        given = {key: each for key, each in value.items() if each not in (None, False)}
        return "(" + " ".join(f"{key}={each}" for key, each in given.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def earlier_config(logs: str, name: str, resume: str | None) -> RunConfig | None:
    """Reads `config.yaml` of the run that `resume` continues, if there is one.

    This is the first look at the run folder, before the data are opened: a name that is taken is
    refused at once.

    Args:
        logs: the folder of all runs.
        name: of this run.
        resume: as in `open_run_folder`.

    Raises:
        UserError: the file is corrupt, or the folder holds a run and `resume` is not set.
    """
    if resume is None:
        _check_new(run_folder(logs, name), resume)
        return None
    folder = RunFolder(Path(resume).parent.parent)
    if resume in {"latest", "auto"}:
        folder = run_folder(logs, name)
        if not checkpoints_in(folder.checkpoints):
            return None  # there is nothing that these settings have made
    if not folder.config.exists():
        return None
    return validate(read_yaml(folder.config), str(folder.config))
