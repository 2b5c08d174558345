"""The flags by which a command finds its checkpoint. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from neuclip.cli.options import Switch
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.model.load import CheckpointChoice


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Which checkpoint of a run, and how it is to be taken."""

    epoch: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the latest)")] = (
        None
    )
    """checkpoint of this epoch"""
    iter: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the latest)")] = (
        None
    )
    """checkpoint of this step"""
    arch: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: the checkpoint's)")
    ] = None
    """architecture, for a checkpoint that does not say it"""
    ema: Switch = True
    """take the weights themselves, not their moving average, where the run kept one"""

    def choice(self, path: Path) -> "CheckpointChoice":
        """The model that the flags choose.

        Raises:
            UserError: a number that counts no epoch or step.
        """
        from neuclip.model.load import CheckpointChoice

        return CheckpointChoice(path, counted(self.epoch), counted(self.iter), self.arch, self.ema)


def counted(value: int | None) -> int | None:
    """An epoch or a step; DataComp's -1 is the latest, as none is.

    Raises:
        UserError: it is below -1.
    """
    if value is not None and value < -1:
        raise UserError(f"{value} is no epoch or step: they count from 0 (-1: the latest)")
    return None if value == -1 else value
