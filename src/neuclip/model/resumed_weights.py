"""Weights for the towers of a run that goes on: its checkpoint holds them.

The starting weights of the run may have been moved, deleted or replaced since. They are read again
only where the checkpoint does not hold them: below the updates of LoRA, and for a teacher.
"""

from dataclasses import replace

from neuclip.checkpoint.storage import VerifiedCheckpoint, read_own_entry
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.architecture import recorded
from neuclip.model.base_weights import ENTRY, LowRankRecord
from neuclip.model.opened_checkpoint import find_base
from neuclip.model.starting_weights import StartingWeights, StartingWeightsReader

_NEW_PLACE = "give their new place as --pretrained"


def read_resumed(
    checkpoint: VerifiedCheckpoint,
    settings: ModelConfig,
    adaptation: AdaptationConfig,
    reader: StartingWeightsReader,
) -> StartingWeights:
    """The weights to build the towers from, before the checkpoint is loaded. Called by all ranks.

    Args:
        checkpoint: that the run resumes from.
        settings: of the towers.
        adaptation: settings of LoRA and distillation.
        reader: reads starting weights.

    Raises:
        UserError: starting weights are needed, and gone or changed.
    """
    own = read_own_entry(checkpoint)
    if own is None or "architecture" not in own:  # of open_clip, or of an earlier version
        return reader.take(settings)
    architecture = recorded(own["architecture"], checkpoint.path)
    low_rank = own.get(ENTRY)
    if low_rank is not None and adaptation.lora_rank is not None:
        record = LowRankRecord.read(low_rank, checkpoint.path)
        given = settings.pretrained or record.given
        try:
            base = find_base(checkpoint.path, replace(record, given=given), architecture.name)
        except UserError as error:
            raise UserError(f"{error}\nTo continue a run, you can also {_NEW_PLACE}") from None
        return StartingWeights(settings, model=base, resumed=architecture)
    if adaptation.distill_start is None:
        return StartingWeights(settings, resumed=architecture)
    try:
        found = reader.take(settings)
    except UserError as error:
        raise UserError(
            f"{error}\nA run with --distill-start reads its starting weights when it goes on, too: "
            f"put them back, or {_NEW_PLACE}"
        ) from None
    return replace(found, resumed=architecture)
