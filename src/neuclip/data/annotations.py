"""Labels, hard negatives and pair weights: from the columns of a table or the keys of a `.json`.

All sources read them by one rule, `AnnotationKeys.read`.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.captions import captions_of, kind_of, written_list
from neuclip.data.samples import NO_ANNOTATIONS, Annotations, SampleError, Unusable
from neuclip.errors import UserError, printable, quantity

CLASS_FILE = "cls"
"""The label key that stands for the `.cls` files of tar shards."""

_TRIED = 200  # samples looked at for a key


class MissingKeyError(UserError):
    """Data have no column or key of the name that a flag gives."""


@dataclass(frozen=True)
class AnnotationKeys:
    """The columns or keys that hold annotations; None: such annotations are not read.

    Attributes:
        label: of the label (`--label-key`).
        hard_negative: of hard negative captions (`--hard-negative-key`).
        pair_weight: of the pair's weight (`--pair-weight-key`).
    """

    label: str | None = None
    hard_negative: str | None = None
    pair_weight: str | None = None

    @classmethod
    def of(cls, reading: ReadingConfig) -> "AnnotationKeys":
        """The keys that the flags name."""
        return cls(reading.label_key, reading.hard_negative_key, reading.pair_weight_key)

    @property
    def by_flag(self) -> dict[str, str]:
        """The keys that are read, by flag."""
        flags = ("--label-key", "--hard-negative-key", "--pair-weight-key")
        keys = (self.label, self.hard_negative, self.pair_weight)
        return {flag: key for flag, key in zip(flags, keys, strict=True) if key is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that are read, each once."""
        return tuple(dict.fromkeys(self.by_flag.values()))

    def read(
        self, record: Mapping[str, object], caption_weights: tuple[float, ...] = ()
    ) -> Annotations:
        """The annotations in a row or a `.json` file.

        A label or hard negative that is absent, null or empty is none; a pair needs its weight.

        Args:
            record: the values by column or key.
            caption_weights: the weights of the sample's captions.

        Raises:
            Unusable: a value is of another type, or a weight is not a number of 0 or more.
        """
        if not (self.names or caption_weights):
            return NO_ANNOTATIONS
        return Annotations(
            caption_weights,
            "" if self.label is None else _label(record.get(self.label), self.label),
            ()
            if self.hard_negative is None
            else _negatives(record.get(self.hard_negative), self.hard_negative),
            1.0
            if self.pair_weight is None
            else _weight(record.get(self.pair_weight), self.pair_weight),
        )

    def check(self, record: Callable[[int], Mapping[str, object]], samples: int, name: str) -> None:
        """Looks for the keys in the `.json` files of many samples.

        Args:
            record: reads the values of the sample at a position; may raise `Unusable`.
            samples: number of samples.
            name: of the source, for the message.

        Raises:
            MissingKeyError: none of the samples has one of the keys.
        """
        if not self.names:
            return
        known: dict[str, None] = {}
        tried = sorted({number * (samples - 1) // (_TRIED - 1) for number in range(_TRIED)})
        for position in tried:
            with contextlib.suppress(Unusable, SampleError):
                known |= dict.fromkeys(record(position))
        there = f"they have {', '.join(map(repr, known))}" if known else "they have none"
        for flag, key in self.by_flag.items():
            if key not in known:
                raise MissingKeyError(
                    f"{name}: no {key!r} for {flag} in the .json files of "
                    f"{quantity(len(tried), 'sample')} tried: {printable(there, 300)}"
                )


def _label(value: object, key: str) -> str:
    """A label as a text: the number 3 and the text "3" are one label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas: no value
        return ""
    if isinstance(value, (str, int, float)):
        return str(value).strip()
    raise Unusable("label", f"{key!r} is {kind_of(value)}, not a text or a number")


def _negatives(value: object, key: str) -> tuple[str, ...]:
    """Hard negatives: a text, a list, or (in csv tables, as NegCLIP's) a list written as text."""
    try:
        return captions_of(written_list(value), repr(key))
    except Unusable as error:
        raise Unusable("hard_negative", error.detail) from error


def _weight(value: object, key: str) -> float:
    if isinstance(value, str) and value.strip():
        try:
            value = float(value)
        except ValueError:
            shown = printable(str(value), 40)
            raise Unusable("pair_weight", f"{key!r} is {shown!r}, not a number") from None
    if value is None or value == "" or isinstance(value, str):
        raise Unusable("pair_weight", f"no weight under {key!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unusable("pair_weight", f"{key!r} is {kind_of(value)}, not a number")
    if not (math.isfinite(value) and value >= 0):
        raise Unusable("pair_weight", f"{key!r} is {value:g}; a weight is finite and 0 or more")
    return float(value)
