"""Losses by name. Imports torch only when a loss is built."""

import reprlib
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

from neuclip.catalogue.building import add_thresholds
from neuclip.catalogue.fields import unit
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings, ThresholdSettings
from neuclip.catalogue.registry import method_info, method_settings, unknown_method
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss

_EXAMPLES = {
    "embed_dim": 512,
    "total_steps": 20_000,
    "steps_per_epoch": 1000,
    "num_samples": 100_000,
    "global_batch_size": 1024,
}


def create_loss(
    name: str,
    *,
    embed_dim: int,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    num_samples: int | None = None,
    global_batch_size: int | None = None,
    **settings: Any,
) -> "PairLoss":
    """Builds the loss of a method, ready for any training loop.

    Only `embed_dim` is needed: what the other numbers would say is seen at the first call, or has a
    default.

    Args:
        name: a method of `neuclip methods`.
        embed_dim: width of the embeddings.
        total_steps: training steps of the whole run, over which gamma falls to its final value;
            none: 24 epochs, and 2 for `neuclip_pool`.
        steps_per_epoch: training steps in an epoch, for schedules in epochs; none: 1,000.
        num_samples: sample ids run from 0 to num_samples - 1, for methods with a state per sample;
            none: the state grows with the ids seen, which waits for the device at every call.
        global_batch_size: pairs in a training step over all ranks; `neuclip_pool` sizes its pool
            by it, unless pool_size is given; none: that of the first call.
        settings: the method's settings that differ from the defaults (`neuclip methods NAME`).

    Returns:
        A module called as `loss(image_features, text_features, logit_scale)`; all its state is in
        its `state_dict`.

    Raises:
        UserError: unknown method or setting (lists what exists), a number of the wrong type or out
            of range, or a setting in epochs without `steps_per_epoch`.
    """
    check_arguments(
        name,
        {
            "embed_dim": embed_dim,
            "total_steps": total_steps,
            "steps_per_epoch": steps_per_epoch,
            "num_samples": num_samples,
            "global_batch_size": global_batch_size,
        },
    )
    run = RunFacts(
        embed_dim, steps_per_epoch, num_samples, global_batch_size, total_steps=total_steps
    )
    return build_loss(method_settings(name, settings), run)


def build_loss(settings: MethodSettings, run: RunFacts) -> "PairLoss":
    """Builds the loss of validated settings.

    Raises:
        UserError: a setting counts epochs of unknown length, or the method does not build a loss.
    """
    if run.steps_per_epoch is None:
        _check_epochs(settings)
    info = method_info(settings.method)
    resolved: object = info.resolve(settings, run.global_batch_size, None)
    _check_result(info, "resolve", resolved, MethodSettings)
    assert isinstance(resolved, MethodSettings)
    loss = info.build(resolved, run)
    from neuclip.method.losses.pair_loss import PairLoss

    _check_result(info, "build", loss, PairLoss)
    loss.takes = info.takes
    low, high = resolved.temperature_bounds
    loss.logit_scale_bounds = (1 / high, 1 / low)
    if isinstance(resolved, ThresholdSettings):
        add_thresholds(loss, resolved, run)
    return loss


def _check_result(info: MethodInfo, part: str, result: object, wanted: type) -> None:
    """Checks what a function of a method, maybe the user's own, has returned."""
    if not isinstance(result, wanted):
        raise UserError(
            f"method {info.name!r} of {info.source}: {part} returned {reprlib.repr(result)} "
            f"instead of a {wanted.__name__} ({wanted.__module__})"
        )


def check_arguments(name: object, numbers: Mapping[str, object]) -> None:
    """Checks the types of what a loss is created with.

    Args:
        name: of the method.
        numbers: arguments of `create_loss` by name; all but `embed_dim` may be none.

    Raises:
        UserError: the name is not a text, or a number is not whole or below 1.
    """
    if not isinstance(name, str):
        raise UserError(unknown_method(str(name)))
    for key, value in numbers.items():
        if value is None and key != "embed_dim":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"{key} {value!r}: must be a whole number, such as {_EXAMPLES[key]}")
        if int(value) < 1:
            raise UserError(f"{key} {value}: must be at least 1")


def _check_epochs(settings: MethodSettings) -> None:
    fields = type(settings).model_fields
    given = [
        f"{key}={getattr(settings, key):g}"
        for key in fields
        if key in settings.model_fields_set
        and unit(fields[key]) == "epochs"
        and getattr(settings, key) is not None
    ]
    if given:
        raise UserError(
            f"method {settings.method!r}: {', '.join(given)} counts epochs: pass "
            "steps_per_epoch=..., the training steps in one"
        )
