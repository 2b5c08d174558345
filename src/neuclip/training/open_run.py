"""Starts a run folder, or finds the checkpoint to resume from."""

import logging
from pathlib import Path

from neuclip.checkpoint.storage import VerifiedCheckpoint, newest_complete, verify
from neuclip.config.recipes import read_yaml
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.run_folder import RunFolder

log = logging.getLogger("neuclip")


def open_run_folder(
    logs: str, name: str, resume: str | None
) -> tuple[RunFolder, VerifiedCheckpoint | None]:
    """Makes the folder of a new run, or finds the checkpoint to resume from.

    One rank calls this and sends the result to the others, so that a checkpoint is hashed once.

    Args:
        logs: the folder of all runs.
        name: of the run.
        resume: a checkpoint; `latest` or `auto` (the newest complete one) of this run; none: start
            a new run.

    Returns:
        The run folder, and the checkpoint to resume from (none: start at step 0).

    Raises:
        UserError: the folder holds a run and `resume` is not set, or is not writable; or the
            checkpoint is missing or corrupt.
    """
    folder = RunFolder(Path(logs) / name)
    checkpoint: VerifiedCheckpoint | None = None
    if resume in {"latest", "auto"}:
        if resume == "auto":
            checkpoint = newest_complete(folder.checkpoints)
        elif folder.latest.exists():
            checkpoint = verify(folder.latest)
        if checkpoint is None:
            log.info("nothing to resume in %s: starting a new run", folder.path)
    elif resume is not None:
        checkpoint = verify(Path(resume))
    if resume is None and (folder.config.exists() or folder.metrics.exists()):
        raise UserError(
            f"{folder.path} already holds a run; continue it with --resume auto, or choose "
            "another --name"
        )
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        probe = folder.path / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder.path}: {error.strerror}; choose another --logs"
        ) from None
    return folder, checkpoint


def earlier_config(logs: str, name: str, resume: str | None) -> RunConfig | None:
    """Reads `config.yaml` of the run that `resume` continues, if there is one.

    Args:
        logs: the folder of all runs.
        name: of this run.
        resume: as in `open_run_folder`.

    Raises:
        UserError: the file is corrupt.
    """
    if resume is None:
        return None
    this_run = RunFolder(Path(logs) / name)
    folder = this_run if resume in {"latest", "auto"} else RunFolder(Path(resume).parent.parent)
    if not folder.config.exists():
        return None
    return validate(read_yaml(folder.config), str(folder.config))
