"""The flags that choose a checkpoint, shared by several commands. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from neuclip.cli.flag_table import settings_flags
from neuclip.cli.flag_values import checked_section
from neuclip.cli.options import Switch
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.model.checkpoint_choice import CheckpointChoice

GivenChanges = dict[str, Any]
"""Values of the flags given, by setting of the `model` section."""

_CHANGES = (
    "force_image_size",
    "force_context_length",
    "force_quick_gelu",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)
_LATEST = arg(metavar="INT", help_behavior_hint="(default: the latest)")
_RECORDED = arg(metavar="NAME", aliases=("--model",), help_behavior_hint="(default: as recorded)")


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Which checkpoint of a run, and which of its weights."""

    epoch: Annotated[int | None, _LATEST] = None
    """checkpoint after this epoch"""
    iter: Annotated[int | None, _LATEST] = None
    """checkpoint after this step"""
    best: Switch = False
    """the checkpoint that --best-metric kept"""
    arch: Annotated[str | None, _RECORDED] = None
    """architecture, for a checkpoint that does not record it"""
    model: Annotated[GivenChanges, OmitArgPrefixes, settings_flags("model", _CHANGES)] = field(
        default_factory=GivenChanges
    )
    no_ema: Switch = False
    """use the weights themselves, even if the run kept their moving average"""

    def choice(self, path: Path) -> "CheckpointChoice":
        """The checkpoint chosen by the flags.

        Raises:
            UserError: an epoch or step below -1, or a size that no image has.
        """
        changes = checked_section("model", self.model)
        changes.check()
        from neuclip.model.checkpoint_choice import CheckpointChoice

        epoch, step = counted(self.epoch), counted(self.iter)
        return CheckpointChoice(
            path, epoch, step, self.arch, ema=not self.no_ema, changes=changes, best=self.best
        )


def counted(value: int | None) -> int | None:
    """An epoch or a step; DataComp's -1 means the latest, like none.

    Raises:
        UserError: it is below -1.
    """
    if value is not None and value < -1:
        raise UserError(f"{value} is not an epoch or step: they count from 0 (-1: the latest)")
    return None if value == -1 else value
