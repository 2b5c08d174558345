"""Published results, quoted with their sources from `published.yaml`."""

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.errors import UserError, nearest

MEASURES = {
    "datacomp": "DataComp average (38)",
    "imagenet-variants": "ImageNet & variants (7)",
    "retrieval": "Retrieval (Flickr + MSCOCO)",
    "imagenet": "ImageNet",
}


@dataclass(frozen=True)
class Citation:
    """The source of published numbers.

    Attributes:
        name: name to display.
        second_hand: read in notes about the paper, not in the paper itself.
        note: caveats about the numbers.
    """

    name: str
    second_hand: bool
    note: str


@dataclass(frozen=True)
class Quoted:
    """A published result.

    Attributes:
        method: the method, by the source's name.
        data: training set.
        source: source of the numbers.
        values: averages of main metrics, 0..1, by the suite's names.
    """

    method: str
    data: str
    source: Citation
    values: dict[str, float]

    @property
    def label(self) -> str:
        """Label of its bar."""
        return (
            f"{self.method}, {self.data} ({'second-hand' if self.source.second_hand else 'quoted'})"
        )


@functools.cache
def load_quoted() -> tuple[Quoted, ...]:
    """All published results, in the order of the file."""
    text = resources.files("neuclip.report").joinpath("published.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = read_yaml_text(text, "published.yaml")
    sources = {key: Citation(**row) for key, row in content["sources"].items()}
    return tuple(
        Quoted(
            row["method"],
            row["data"],
            sources[row["source"]],
            {key: row[key] / 100 for key in MEASURES if key in row},
        )
        for row in content["rows"]
    )


def quoted_for(data: str) -> list[Quoted]:
    """Published results for one training set.

    Raises:
        UserError: nothing is quoted for it.
    """
    names = list(dict.fromkeys(row.data for row in load_quoted()))
    by_letters = {_letters(name): name for name in names}
    if _letters(data) not in by_letters:
        raise UserError(f"no published numbers for training set {data!r}; {nearest(data, names)}")
    return [row for row in load_quoted() if row.data == by_letters[_letters(data)]]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
