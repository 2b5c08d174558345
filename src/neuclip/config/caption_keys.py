"""Several keys of captions, of which each visit draws one by its weight. Imports no torch."""

import math
from dataclasses import dataclass

from neuclip.errors import UserError

_FORM = (
    "expected keys joined by commas, each with a weight, as in long=0.7,short=0.3, or all without"
)


@dataclass(frozen=True)
class CaptionKeys:
    """Columns of a table, or keys of a `.json` file, that hold captions.

    Attributes:
        names: the keys.
        weights: how likely each is drawn, in proportion; 0: only if all others lack a caption.
            Empty: nothing is drawn, the first key with a caption is read.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()

    @classmethod
    def weighted(cls, text: str) -> "CaptionKeys":
        """The keys in `--caption-keys`.

        Raises:
            UserError: a key is empty or given twice, or the weights are not weights.
        """
        flag = f"--caption-keys {text}"
        pairs = [_key_and_weight(part.strip()) for part in text.split(",")]
        names, weights = tuple(name for name, _ in pairs), [weight for _, weight in pairs]
        given = [weight for weight in weights if weight is not None]
        if not all(names) or (given and len(given) < len(weights)):
            raise UserError(f"{flag}: {_FORM}")
        return cls(_distinct(names, flag), _checked(given or [1.0] * len(names), flag))

    @classmethod
    def prioritised(
        cls, text: str, probabilities: tuple[float, ...] | None = None
    ) -> "CaptionKeys":
        """The keys in `--caption-key`, joined by `;`, with those of `--caption-key-probs`.

        As in open_clip, keys without a probability have 0.

        Raises:
            UserError: there are more probabilities than keys, or they are not probabilities.
        """
        names = tuple(key for key in (part.strip() for part in text.split(";")) if key)
        if probabilities is None:
            return cls(names)
        flag = f"--caption-key-probs {' '.join(f'{each:g}' for each in probabilities)}"
        if len(probabilities) > len(names):
            raise UserError(f"{flag}: more probabilities than keys in --caption-key {text}")
        missing = [0.0] * (len(names) - len(probabilities))
        return cls(_distinct(names, flag), _checked([*probabilities, *missing], flag))


def _key_and_weight(part: str) -> tuple[str, float | None]:
    """A key and its weight; none if no number follows the last `=`."""
    name, equals, weight = part.rpartition("=")
    try:
        return (name.strip(), float(weight)) if equals else (part, None)
    except ValueError:
        return part, None


def _distinct(names: tuple[str, ...], flag: str) -> tuple[str, ...]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{flag}: {twice[0]!r} is given twice")
    return names


def _checked(weights: list[float], flag: str) -> tuple[float, ...]:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"{flag}: weights are numbers, 0 or more, and one of them is above 0")
    return tuple(weights)
