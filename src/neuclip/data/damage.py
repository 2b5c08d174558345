"""The record of what could not be read, kept by the main process."""

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
    """What a `DamageLog` knows, as it is written to `data_report.json` and to checkpoints."""

    total: int
    by_kind: dict[str, int]
    by_shard: dict[str, int]
    examples: list[dict[str, str]]


class DamageLog:
    """Counts damage by kind and by shard, and lists the first ten thousand.

    A damaged sample counts each time it is met, as a good one counts each time it is seen. What a
    scan of the shards finds (`INDEX_KINDS`) counts once.
    """

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._examples: dict[Damage, None] = {}  # in the order of the first meeting

    @property
    def total(self) -> int:
        """How often damage was met."""
        return self._kinds.total()

    def add(self, damage: Iterable[Damage]) -> list[Damage]:
        """Record damage; returns what is new, of the first hundred, to be named in the log."""
        named: list[Damage] = []
        for found in damage:
            self._kinds[found.kind] += 1
            self._shards[found.shard] += 1
            if len(self._examples) < _LISTED and found not in self._examples:
                self._examples[found] = None
                if len(self._examples) <= _NAMED:
                    named.append(found)
        return named

    @property
    def met(self) -> int:
        """Damaged samples met while reading; what a scan of the shards found is not among them."""
        return sum(count for kind, count in self._kinds.items() if kind not in INDEX_KINDS)

    def check(self, max_bad_fraction: float, seen: int, met: int | None = None) -> None:
        """Stop when more than `max_bad_fraction` of the samples read are damaged.

        Args:
            max_bad_fraction: the limit.
            seen: samples read, by all processes if `met` is given.
            met: damaged samples that all processes have met; by default those in this log.

        What a scan of the shards found is not counted here, but by `check_index`. A limit of 0
        stops at the first damage. Above that, three standard deviations of chance are allowed on
        top, so that one damaged sample in the first batch stops nothing.

        Raises:
            UserError: too much damage; the message names the worst shards.
        """
        met = self.met if met is None else met
        if met > _allowed(max_bad_fraction, seen):
            raise UserError(
                f"{met} damaged samples met while reading {seen} samples: more than "
                f"--max-bad-fraction {max_bad_fraction:g} allows. Worst: "
                f"{_worst(self._shards)}. Mend or remove them, or raise the limit"
            )

    def summary(self) -> str:
        """Counts by kind in a few words."""
        return ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())

    def report(self) -> DamageReport:
        """All that is known; `from_report` takes it back."""
        return {
            "total": self.total,
            "by_kind": dict(self._kinds.most_common()),
            "by_shard": dict(self._shards.most_common()),
            "examples": [asdict(example) for example in self._examples],
        }

    @classmethod
    def from_report(cls, report: DamageReport) -> "DamageLog":
        """The log that gave a report, to go on with after a resume."""
        log = cls()
        log.add_report(report)
        return log

    def add_report(self, report: DamageReport) -> None:
        """Record what another process's log reports."""
        self._kinds.update(report["by_kind"])
        self._shards.update(report["by_shard"])
        for example in report["examples"][: _LISTED - len(self._examples)]:
            kind = cast(DamageKind, example["kind"])
            found = Damage(example["shard"], example["key"], kind, example["detail"])
            self._examples[found] = None


def check_index(
    damage: Sequence[Damage], max_bad_fraction: float, *, samples: int, shards: int
) -> None:
    """Stop when too much of the shards is lost before the first sample is read.

    The limit holds for the share of damaged shards, and for the share of samples and members left
    out of the others; `DamageLog.check` says how much chance is allowed on top.

    Raises:
        UserError: too much damage; the message names the worst shards.
    """
    broken = sum(found.kind == "shard" for found in damage)
    for lost, number, what in (
        (broken, shards, f"of {shards} shards are damaged"),
        (len(damage) - broken, samples, f"members are left out of shards of {samples} samples"),
    ):
        if lost > _allowed(max_bad_fraction, number):
            by_shard = Counter(found.shard for found in damage)
            raise UserError(
                f"{lost} {what}: more than --max-bad-fraction {max_bad_fraction:g} allows. "
                f"Worst: {_worst(by_shard)}. The first: {damage[0]}. "
                "Mend or remove them, or raise the limit (neuclip data inspect lists all)"
            )


def _allowed(max_bad_fraction: float, number: int) -> float:
    """How much damage a limit lets pass among so many."""
    allowed = max_bad_fraction * number
    return allowed + 3 * math.sqrt(allowed) + 1 if max_bad_fraction > 0 else 0


def _worst(by_shard: Counter[str]) -> str:
    return ", ".join(f"{shard} ({count})" for shard, count in by_shard.most_common(5))
