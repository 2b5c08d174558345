"""The folder of a run: which files it has, and how it is begun or continued."""

import logging
import sys
from pathlib import Path

from neuclip.checkpoint.storage import VerifiedCheckpoint, newest_complete, verify
from neuclip.config.recipes import read_yaml
from neuclip.config.run_config import RunConfig, validate
from neuclip.errors import UserError
from neuclip.run_folder import RunFolder

log = logging.getLogger("neuclip")


def open_run_folder(
    logs: str, name: str, resume: str | None
) -> tuple[RunFolder, VerifiedCheckpoint | None]:
    """Makes the folder of a new run, or finds the checkpoint to continue from.

    One rank calls this and sends the result to the others: the checkpoint is hashed once.

    Returns:
        The folder, and the checkpoint to continue from (none: a new run).

    Raises:
        UserError: the folder belongs to an earlier run and `resume` was not asked for, the
            checkpoint is missing or damaged, or permission is denied.
    """
    folder = RunFolder(Path(logs) / name)
    checkpoint: VerifiedCheckpoint | None = None
    if resume in {"latest", "auto"}:
        if resume == "auto":
            checkpoint = newest_complete(folder.checkpoints)
        elif folder.latest.exists():
            checkpoint = verify(folder.latest)
        if checkpoint is None:
            log.info("nothing to resume in %s: a new run begins", folder.path)
    elif resume is not None:
        checkpoint = verify(Path(resume))
    begun = folder.config.exists() or folder.metrics.exists()
    if begun and resume is None:
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
    """The settings, as they were asked for, of the run that `resume` continues, if it has any.

    Raises:
        UserError: its config.yaml is damaged.
    """
    if resume is None:
        return None
    own = RunFolder(Path(logs) / name)
    folder = own if resume in {"latest", "auto"} else RunFolder(Path(resume).parent.parent)
    if not folder.config.exists():
        return None
    return validate(read_yaml(folder.config), str(folder.config))


def log_to(file: Path | None) -> None:
    """Sends the package's messages to the terminal (standard error) and to a file."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        log.addHandler(to_file)
