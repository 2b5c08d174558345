"""Part: a question, its share of the time, and what it needs."""

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check.facts import Facts


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: in results and messages.
        module: of this package, with the function `run(job)`.
        asks: what it answers.
        minutes: its share of the time; what an earlier part leaves is added.
        capability: the oldest compute capability that it is for.
        gib: free memory of the card that it needs.
        packages: modules to import beside neuclip's own.
    """

    name: str
    module: str
    asks: str
    minutes: float
    capability: tuple[int, int] = (0, 0)
    gib: float = 0.0
    packages: tuple[str, ...] = ()

    def obstacle(self, facts: Facts) -> str | None:
        """Why the part is left out here; none: it runs."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            return f"{', '.join(missing)} missing: see scripts/gather_wheels.py"
        if not facts.on_cuda:
            return None  # at toy size
        if facts.capability < self.capability:
            found, wanted = (".".join(map(str, c)) for c in (facts.capability, self.capability))
            return (
                f"{facts.card} has compute capability {found}; this part is for {wanted} or newer"
            )
        if facts.free_gib < self.gib:
            return (
                f"{self.gib:g} GiB wanted, {facts.free_gib:.1f} of {facts.total_gib:.1f} GiB free "
                f"on {facts.card}"
            )
        return None


@dataclass(frozen=True)
class Job:
    """What a part is told.

    Attributes:
        part: its name.
        device: `cuda` or `cpu`.
        toy: sizes that a CPU computes in seconds.
        folder: for files of its own.
        results: the file that `record` appends to.
        free_gib: free memory of the card; 0 on a CPU.
        until: time (of `time.time`) at which the part is stopped.
    """

    part: str
    device: str
    toy: bool
    folder: Path
    results: Path
    free_gib: float = 0.0
    until: float = field(default=float("inf"))

    def record(self, **row: Any) -> None:
        """Appends a result at once: it stays if the part is stopped later."""
        append(self.results, {"part": self.part, **row})
        print(json.dumps(row), flush=True)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part is stopped."""
        return self.until - time.time()

    def to_json(self) -> str:
        """For the command line of the child."""
        values = asdict(self) | {"folder": str(self.folder), "results": str(self.results)}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {key: Path(values[key]) for key in ("folder", "results")})


def append(path: Path, row: dict[str, Any]) -> None:
    """Appends a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
