"""Published numbers, quoted: `published.yaml` as data."""

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from neuclip.errors import UserError, nearest

MEASURES = {
    "datacomp": "DataComp average (38)",
    "imagenet-variants": "ImageNet & variants (7)",
    "retrieval": "Retrieval (Flickr + MSCOCO)",
    "imagenet": "ImageNet",
}


@dataclass(frozen=True)
class Source:
    """Where numbers were read.

    Attributes:
        name: In words.
        second_hand: In notes about the paper, not in the paper itself.
        note: What else there is to know.
    """

    name: str
    second_hand: bool
    note: str


@dataclass(frozen=True)
class Quoted:
    """A published result.

    Attributes:
        method: The method, as its source calls it.
        data: What it was trained on.
        source: Where it was read.
        values: Averages of main metrics by the suite's names, 0..1.
    """

    method: str
    data: str
    source: Source
    values: dict[str, float]

    @property
    def label(self) -> str:
        """Name of its bar."""
        return (
            f"{self.method}, {self.data} ({'second-hand' if self.source.second_hand else 'quoted'})"
        )


@functools.cache
def load_published() -> tuple[Quoted, ...]:
    """All rows, in the file's order."""
    text = resources.files("neuclip.report").joinpath("published.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    sources = {key: Source(**row) for key, row in content["sources"].items()}
    return tuple(
        Quoted(
            row["method"],
            row["data"],
            sources[row["source"]],
            {key: row[key] / 100 for key in MEASURES if key in row},
        )
        for row in content["rows"]
    )


def published_for(data: str) -> list[Quoted]:
    """Rows of one training set.

    Raises:
        UserError: nothing is quoted for it; names the nearest.
    """
    names = list(dict.fromkeys(row.data for row in load_published()))
    by_letters = {_letters(name): name for name in names}
    if _letters(data) not in by_letters:
        raise UserError(f"no numbers are quoted for data {data!r}; {nearest(data, names)}")
    return [row for row in load_published() if row.data == by_letters[_letters(data)]]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
