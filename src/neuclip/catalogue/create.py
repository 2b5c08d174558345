"""Losses by name. Imports torch only when a loss is built."""

from typing import TYPE_CHECKING, Any

from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.catalogue.registry import method_info, method_settings
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


def create_loss(
    name: str,
    *,
    embed_dim: int,
    steps_per_epoch: int | None = None,
    num_samples: int | None = None,
    global_batch_size: int | None = None,
    **settings: Any,
) -> "PairLoss":
    """Builds the loss of a method, ready for any training loop.

    Args:
        name: a method of `neuclip methods`.
        embed_dim: width of the embeddings.
        steps_per_epoch: training steps in an epoch, for methods with a schedule in epochs.
        num_samples: sample ids run from 0 to num_samples - 1, for methods with a state per sample.
        global_batch_size: pairs in a training step over all ranks; `neuclip_pool` sizes its pool
            by it, unless pool_size is given.
        settings: the method's settings that differ from the defaults (`neuclip methods NAME`).

    Returns:
        A module called as `loss(image_features, text_features, logit_scale)`; all its state is in
        its `state_dict`.

    Raises:
        UserError: unknown method or setting (lists what exists), a value out of range, or a missing
            length of the schedule or number of samples.
    """
    run = RunFacts(embed_dim, steps_per_epoch, num_samples, global_batch_size)
    return build_loss(method_settings(name, settings), run)


def build_loss(settings: MethodSettings, run: RunFacts) -> "PairLoss":
    """Builds the loss of validated settings.

    Raises:
        UserError: a fact of the run that the method needs is missing or below 1, or a setting has
            no effect.
    """
    for key in ("embed_dim", "steps_per_epoch", "num_samples", "global_batch_size"):
        value = getattr(run, key)
        if value is not None and value < 1:
            raise UserError(f"{key} {value}: must be at least 1")
    info = method_info(settings.method)
    return info.build(info.resolve(settings, run.global_batch_size, None), run)
