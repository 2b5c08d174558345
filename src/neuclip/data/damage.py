"""The record of corrupt samples, kept by the main process, and the limit on their number."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TypedDict, cast

from neuclip.data.samples import INDEX_KINDS, Damage, DamageKind
from neuclip.errors import UserError

_LISTED = 10_000
_NAMED = 100


class DamageReport(TypedDict):
    """The content of a `DamageLog`, as written to `data_report.json` and to checkpoints."""

    total: int
    by_kind: dict[str, int]
    by_shard: dict[str, int]
    examples: list[dict[str, str]]


class DamageLog:
    """Counts corrupt samples by kind and by shard, and lists the first ten thousand.

    A corrupt sample counts each time it is read, like a good one. What indexing finds
    (`INDEX_KINDS`) counts once.
    """

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._examples: dict[Damage, None] = {}  # in the order of first occurrence

    @property
    def total(self) -> int:
        """Number of occurrences."""
        return self._kinds.total()

    def add(self, damage: Iterable[Damage]) -> list[Damage]:
        """Records corrupt samples; returns the new ones among the first hundred, to be logged."""
        named: list[Damage] = []
        for found in damage:
            self._kinds[found.kind] += 1
            self._shards[found.shard] += 1
            if len(self._examples) < _LISTED and found not in self._examples:
                self._examples[found] = None
                if len(self._examples) <= _NAMED:
                    named.append(found)
        return named

    def check(self, max_bad_fraction: float, seen: int) -> None:
        """Stops if more than `max_bad_fraction` of the samples read are corrupt.

        Indexing is not counted here but by `check_index`. A limit of 0 stops at the first corrupt
        sample. Otherwise a margin of three standard deviations is allowed, so that one corrupt
        sample in the first batch stops nothing.

        Args:
            max_bad_fraction: the limit.
            seen: number of samples read.

        Raises:
            UserError: too many corrupt samples; the message names the worst shards.
        """
        corrupt = sum(n for kind, n in self._kinds.items() if kind not in INDEX_KINDS)
        if corrupt > _allowed(max_bad_fraction, seen):
            raise UserError(
                f"{corrupt} of {seen} samples read are corrupt: more than --max-bad-fraction "
                f"{max_bad_fraction:g} allows. Worst: {_worst(self._shards)}. Fix or remove them, "
                "or raise the limit"
            )

    @property
    def examples(self) -> list[Damage]:
        """The first cases."""
        return list(self._examples)

    def summary(self) -> str:
        """Counts by kind in a few words."""
        return ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())

    def report(self) -> DamageReport:
        """The content of the log, for `from_report`."""
        return {
            "total": self.total,
            "by_kind": dict(self._kinds.most_common()),
            "by_shard": dict(self._shards.most_common()),
            "examples": [asdict(example) for example in self._examples],
        }

    @classmethod
    def from_report(cls, report: DamageReport) -> "DamageLog":
        """Restores a log from its report, to resume a run."""
        log = cls()
        log.add_report(report)
        return log

    def add_report(self, report: DamageReport) -> None:
        """Adds the report of another process's log."""
        self._kinds.update(report["by_kind"])
        self._shards.update(report["by_shard"])
        for example in report["examples"][: _LISTED - len(self._examples)]:
            kind = cast(DamageKind, example["kind"])
            found = Damage(example["shard"], example["key"], kind, example["detail"])
            self._examples[found] = None


def check_index(
    damage: Sequence[Damage], max_bad_fraction: float, *, samples: int, shards: int
) -> None:
    """Stops if too much is corrupt before the first sample is read.

    The limit applies to the fraction of corrupt shards, and to the fraction of samples and members
    left out of the others, with the margin of `DamageLog.check`.

    Args:
        damage: corrupt shards and samples found on indexing.
        max_bad_fraction: the limit.
        samples: number of usable samples.
        shards: number of shards.

    Raises:
        UserError: too much is corrupt; the message names the worst shards.
    """
    broken = sum(found.kind == "shard" for found in damage)
    for lost, number, what in (
        (broken, shards, f"of {shards} shards are corrupt"),
        (len(damage) - broken, samples, f"members are left out of shards of {samples} samples"),
    ):
        if lost > _allowed(max_bad_fraction, number):
            by_shard = Counter(found.shard for found in damage)
            raise UserError(
                f"{lost} {what}: more than --max-bad-fraction {max_bad_fraction:g} allows. "
                f"Worst: {_worst(by_shard)}. The first: {damage[0]}. "
                "Fix or remove them, or raise the limit (neuclip data inspect lists all)"
            )


def check_read_once(corrupt: int, max_bad_fraction: float, *, samples: int) -> None:
    """Stops if too many samples are corrupt where all are read once before the first step.

    Args:
        corrupt: number of corrupt samples.
        max_bad_fraction: the limit, with the margin of `DamageLog.check`.
        samples: number of samples.

    Raises:
        UserError: too many are corrupt.
    """
    if corrupt > _allowed(max_bad_fraction, samples):
        raise UserError(
            f"{corrupt:,} of {samples:,} samples are corrupt: more than --max-bad-fraction "
            f"{max_bad_fraction:g} allows. Fix or remove them, or raise the limit (neuclip data "
            "inspect names some)"
        )


def _allowed(max_bad_fraction: float, number: int) -> float:
    """The number of corrupt ones among `number` that a limit allows."""
    allowed = max_bad_fraction * number
    return allowed + 3 * math.sqrt(allowed) + 1 if max_bad_fraction > 0 else 0


def _worst(by_shard: Counter[str]) -> str:
    return ", ".join(f"{shard} ({count})" for shard, count in by_shard.most_common(5))
