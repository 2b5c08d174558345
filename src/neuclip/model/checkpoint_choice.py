"""Which checkpoint is meant: of a run folder, a repository, or a file."""

from dataclasses import dataclass, field
from pathlib import Path

from neuclip.checkpoint.sharded import is_sharded
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.absent import absent
from neuclip.model.architecture import REPOSITORY_WEIGHTS, is_repository
from neuclip.run_folder import RunFolder

_WEIGHT_FILES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}


@dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoint to open, and which of its weights to take.

    Attributes:
        path: run folder, checkpoint, or Hugging Face open_clip repository on disk; or a name of
            published weights, which are downloaded: a tag of open_clip's, or `hf-hub:` and the name
            of a repository.
        epoch: in a run folder, the checkpoint after this epoch.
        step: in a run folder, the checkpoint after this step; with neither, the newest.
        arch: architecture; none: the one that the checkpoint records.
        ema: take the moving average of the weights if the checkpoint holds one, as evaluation
            during training does.
        changes: image size and preprocessing that are asked for; none: as recorded.
        best: in a run folder, the checkpoint that `--best-metric` kept.
    """

    path: Path
    epoch: int | None = None
    step: int | None = None
    arch: str | None = None
    ema: bool = True
    changes: ModelConfig = field(default_factory=ModelConfig)
    best: bool = False


def chosen_path(choice: CheckpointChoice, model: str | None) -> Path:
    """The file of a checkpoint, or its folder if it is sharded.

    Args:
        choice: its path is on disk.
        model: the architecture that the weights are for, for the message; none: that of the choice.

    Raises:
        UserError: no such checkpoint; or a flag chooses one where there is only one.
    """
    in_repository = is_repository(choice.path)
    return _path_in_repository(choice) if in_repository else _path_in_run(choice, model)


def _path_in_run(choice: CheckpointChoice, model: str | None) -> Path:
    path, asked = choice.path, (choice.epoch, choice.step, choice.best or None)
    if path.is_file() or is_sharded(path) or (path.suffix in _WEIGHT_FILES and not path.is_dir()):
        if any(each is not None for each in asked):
            raise UserError(f"{path} is a checkpoint: --epoch, --iter and --best need a run folder")
        return path
    if sum(each is not None for each in asked) > 1:
        raise UserError("--epoch, --iter and --best name several checkpoints: give one")
    folder = RunFolder(path)
    if not folder.checkpoints.is_dir():
        raise absent(path, model or choice.arch)
    if choice.best:
        if not folder.best.exists():
            raise UserError(
                f"{path} has no best checkpoint: it was not trained with --best-metric, or no "
                "evaluation is done yet; --epoch N takes a checkpoint by its number"
            )
        return folder.best
    if choice.epoch is not None:
        return folder.epoch_checkpoint(choice.epoch)
    return folder.latest if choice.step is None else folder.step_checkpoint(choice.step)


def require_single(choice: CheckpointChoice) -> None:
    """Checks that no other checkpoint or architecture is asked for where there is one.

    Raises:
        UserError: names the flag.
    """
    for flag, value in (
        ("--epoch", choice.epoch),
        ("--iter", choice.step),
        ("--best", choice.best or None),
        ("--arch", choice.arch),
    ):
        if value is not None:
            raise UserError(f"{choice.path} is a repository with one model: leave out {flag}")


def _path_in_repository(choice: CheckpointChoice) -> Path:
    require_single(choice)
    found = weights_in_repository(choice.path)
    if found is None:
        raise UserError(
            f"{choice.path} has no weights: expected {REPOSITORY_WEIGHTS[0]} or another of "
            "open_clip's and transformers' names"
        )
    return found


def weights_in_repository(folder: Path) -> Path | None:
    """The file of weights in a repository on disk; None if it has none."""
    files = (folder / name for name in REPOSITORY_WEIGHTS)
    return next((file for file in files if file.is_file()), None)
