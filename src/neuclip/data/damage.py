"""The record of what could not be read, kept by the main process."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

from neuclip.data.samples import Damage
from neuclip.errors import UserError

_EXAMPLES = 100


class DamageReport(TypedDict):
    """What a `DamageLog` knows, as it is written to `data_report.json` and to checkpoints."""

    total: int
    by_kind: dict[str, int]
    by_shard: dict[str, int]
    examples: list[dict[str, str]]


class DamageLog:
    """Counts damage by kind and by shard, and keeps the first examples.

    A damaged sample counts each time it is met, as a good one counts each time it is seen.
    """

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._examples: list[dict[str, str]] = []

    @property
    def total(self) -> int:
        """How often damage was met."""
        return self._kinds.total()

    def add(self, damage: Iterable[Damage]) -> list[Damage]:
        """Record damage; returns what became an example, to be named in the log."""
        named: list[Damage] = []
        for found in damage:
            self._kinds[found.kind] += 1
            self._shards[found.shard] += 1
            example = {
                "shard": found.shard,
                "key": found.key,
                "kind": found.kind,
                "detail": found.detail,
            }
            if len(self._examples) < _EXAMPLES and example not in self._examples:
                self._examples.append(example)
                named.append(found)
        return named

    def check(self, max_bad_fraction: float, seen: int) -> None:
        """Stop when more than `max_bad_fraction` of the samples are damaged.

        A limit of 0 stops at the first damage. Above that, three standard deviations of chance
        are allowed on top, so that one damaged sample in the first batch stops nothing.

        Raises:
            UserError: too much damage; the message names the worst shards.
        """
        allowed = max_bad_fraction * seen
        if max_bad_fraction > 0:
            allowed += 3 * math.sqrt(allowed) + 1
        if self.total > allowed:
            worst = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(5))
            raise UserError(
                f"{self.total} damaged samples or shards met while reading {seen} samples: more "
                f"than --max-bad-fraction {max_bad_fraction:g} allows. Worst: {worst}. "
                "Mend or remove them, or raise the limit"
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
            "examples": [dict(example) for example in self._examples],
        }

    @classmethod
    def from_report(cls, report: DamageReport) -> "DamageLog":
        """The log that gave a report, to go on with after a resume."""
        log = cls()
        log._kinds.update(report["by_kind"])
        log._shards.update(report["by_shard"])
        log._examples.extend(dict(example) for example in report["examples"])
        return log
