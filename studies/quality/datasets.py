"""The data sets of the study: what each trains, for how long, and its splits."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from neuclip.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        name: in cells, rows and flags.
        description: the file in its folder that describes it.
        splits: the splits without their parts `development` and `test`: first pictures of a kind
            that training does not show, then ideas that it does not show.
        about: number of training pairs, about: what settings in passes are converted with.
        model: the architecture that is trained.
        passes: over the training pairs, in a run.
        evaluated_every: passes between two evaluations on the development splits.
        concept_key: the key that has what a picture shows, in the `.json` of a sample.
        build: the command that makes it.
    """

    name: str
    description: str
    splits: tuple[str, str]
    about: int
    model: str
    passes: int
    evaluated_every: int
    concept_key: str
    build: str

    def split_names(self, part: str) -> list[str]:
        """The folders of the splits of a part, `development` or `test`."""
        return [f"{split}_{part}" for split in self.splits]


EMOJI = DataSet(
    "emoji", "pairs.json", ("unseen_vendor", "unseen_emoji"), 11_500, "icon-tiny", 8, 2,
    "concept", "neuclip data emoji PACKAGES --out DIR",
)  # fmt: skip
ICONS = DataSet(
    "icons", "pairs.json", ("unseen_style", "unseen_concept"), 139_000, "icon-tiny", 2, 1,
    "concept", "neuclip data icons PACKAGES --out DIR",
)  # fmt: skip
GLYPHS = DataSet(
    "glyphs", "demo.json", ("unseen_face", "unseen_character"), 40_000, "glyph-tiny", 12, 3,
    "name", "neuclip data demo --out DIR",
)  # fmt: skip
MAIN_SETS = ("glyphs", "icons", "emoji")
"""The data sets that all methods run on."""


def _of_equal_size(whole: DataSet, wrong: float = 0.0) -> DataSet:
    """The part of a data set that `equal_size` writes, for as many pairs as `longer` on emoji."""
    name, share = (
        (f"{whole.name}7wrong", f" --wrong {wrong:g}") if wrong else (f"{whole.name}7", "")
    )
    return replace(
        whole, name=name, about=11_550, passes=24, evaluated_every=6,
        build=f"python -m studies.quality.equal_size DIR --of {whole.name}{share} --out DIR",
    )  # fmt: skip


EQUAL_SIZE = {whole.name: _of_equal_size(whole) for whole in (GLYPHS, ICONS)}
"""By the data set of which they are a part."""
WRONG = _of_equal_size(GLYPHS, wrong=0.2)
"""The part of the glyphs, with wrong names in training."""
DATA_SETS = {data.name: data for data in (GLYPHS, ICONS, EMOJI, *EQUAL_SIZE.values(), WRONG)}


@dataclass(frozen=True)
class DataFolder:
    """A data set on disk.

    Attributes:
        data: which data set.
        path: its folder.
    """

    data: DataSet
    path: Path

    @classmethod
    def open(cls, data: DataSet, path: Path) -> "DataFolder":
        """The folder, checked.

        Raises:
            UserError: it is not that data set, or an earlier version of it.
        """
        folder = cls(data, path.resolve())
        flag = f"--{data.name} {path}"
        remedy = f"build it with `{data.build}`"
        if not (path / data.description).is_file():
            raise UserError(f"{flag}: no {data.name} ({data.description} is missing); {remedy}")
        wanted = [*data.split_names("development"), *data.split_names("test")]
        missing = [split for split in ("train", *wanted) if not (path / split).is_dir()]
        if missing:
            raise UserError(
                f"{flag}: not the {data.name}, or an earlier version: without "
                f"{', '.join(missing)}; {remedy}"
            )
        return folder

    @cached_property
    def digest(self) -> str:
        """A digest of the description.

        That of icons and emoji has a digest of every shard. That of the glyphs has the sizes of its
        shards, and the accuracies without learning, which follow from the pictures.
        """
        content = (self.path / self.data.description).read_bytes()
        return hashlib.sha256(content).hexdigest()[:12]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The description."""
        text = (self.path / self.data.description).read_text(encoding="utf-8")
        return json.loads(text)

    def splits(self, part: str) -> list[Path]:
        """The folders of the splits of a part."""
        return [self.path / name for name in self.data.split_names(part)]

    @property
    def pairs(self) -> int:
        """Number of training pairs."""
        return int(self.facts["splits"]["train"]["pairs"])

    def floor(self, split: str) -> float | None:
        """Top-1 without learning on a split, by the nearest training picture; None if unknown."""
        return self.facts["splits"].get(split, {}).get("floor_top1")
