"""Options and checks that several commands share."""

import math
import operator
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from neuclip.errors import UserError

Switch = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]


def check_range(
    flag: str,
    value: float | None,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> None:
    """Refuses a number that is out of range, in the words of `neuclip train`.

    Args:
        flag: the flag without its dashes.
        value: the number; None is not checked.
        ge: smallest allowed value.
        gt: bound that the value must exceed.
        le: largest allowed value.

    Raises:
        UserError: the number is out of range, or not finite.
    """
    if value is None:
        return
    bounds = [(">=", ge, operator.ge), (">", gt, operator.gt), ("<=", le, operator.le)]
    bounds = [(sign, bound, fits) for sign, bound, fits in bounds if bound is not None]
    if not math.isfinite(value) or not all(fits(value, bound) for _, bound, fits in bounds):
        allowed = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in bounds)
        raise UserError(f"--{flag}: {value:g} is out of range; it must be {allowed}")
