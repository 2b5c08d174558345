"""Drawn pictures of concepts, of which no two of one concept look the same."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from neuclip.data.icons.pair_folder import chance
from neuclip.data.icons.rendering import Failure, Look, Svg, draw_all
from neuclip.data.outlines import Outlines, distinct
from neuclip.data.progress import Progress

IconSet = Mapping[str, Any]
"""A set in Iconify's JSON form."""


class Depiction(Protocol):
    """Something of a set that can be drawn."""

    @property
    def set(self) -> str:
        """Prefix of its set."""
        ...

    @property
    def name(self) -> str:
        """Name of the icon in the set."""
        ...

    @property
    def concept(self) -> str:
        """The identity of what is shown."""
        ...


T = TypeVar("T", bound=Depiction)


@dataclass(frozen=True)
class DrawingRule:
    """What decides the pictures, with the sets.

    Attributes:
        size: width and height of the images in pixels.
        seed: decides looks, and which of two similar pictures stays.
        margins: smallest and largest margin in pixels.
        limit: correlation of outlines from which two pictures count as one.
    """

    size: int
    seed: int
    margins: tuple[int, int]
    limit: float


@dataclass(frozen=True)
class PictureSet(Generic[T]):
    """Pictures, addressed by their positions.

    Attributes:
        depicted: what each picture shows.
        pngs: the image files.
        outlines: of the images.
        seed: decides every random choice.
        not_drawn: number of drawings that failed, by reason.
    """

    depicted: Sequence[T]
    pngs: Sequence[bytes]
    outlines: Outlines
    seed: int
    not_drawn: Mapping[Failure, int]

    def concept(self, at: int) -> str:
        """What a picture shows."""
        return self.depicted[at].concept

    def shuffled(self, members: Sequence[int]) -> list[int]:
        """Positions in a random order."""
        return sorted(
            members, key=lambda at: chance(self.seed, "order", key_of(self.depicted[at])).random()
        )


def key_of(depiction: Depiction) -> str:
    """Set and name, as Iconify writes them."""
    return f"{depiction.set}:{depiction.name}"


def draw_distinct(
    depictions: Sequence[T],
    sets: Mapping[str, IconSet],
    rule: DrawingRule,
    processes: int,
    progress: Progress | None = None,
) -> PictureSet[T]:
    """Draws icons, and leaves out those that look like another one of their concept.

    Args:
        depictions: what to draw.
        sets: the sets, by prefix.
        rule: what decides the pictures.
        processes: number of drawing processes.
        progress: called while icons are drawn.

    Raises:
        UserError: no drawing process can work.
    """
    looks = [_look(each, sets[each.set], rule) for each in depictions]
    svgs = [Svg.of_set(sets[each.set], each.name) for each in depictions]
    drawn = draw_all(list(zip(svgs, looks, strict=True)), rule.size, processes, progress)
    order = sorted(
        np.flatnonzero(drawn.outlines.any(1)).tolist(),  # those that are drawn
        key=lambda at: chance(rule.seed, "first", key_of(depictions[at])).random(),
    )
    groups: dict[str, list[int]] = defaultdict(list)
    for at in order:
        groups[depictions[at].concept].append(at)
    kept = distinct(groups.values(), drawn.outlines, rule.limit)
    return PictureSet(
        [depictions[at] for at in kept],
        [drawn.pngs[at] for at in kept],
        drawn.outlines[kept],
        rule.seed,
        {reason: len(failed) for reason, failed in drawn.failures.items()},
    )


def _look(depiction: Depiction, content: IconSet, rule: DrawingRule) -> Look:
    one_colour = not content["info"].get("palette")
    random = chance(rule.seed, "look", key_of(depiction))
    return Look.draw(random, rule.margins, one_colour=one_colour)


def licence_of(content: IconSet) -> str:
    """The licence of a set, by its SPDX identifier where it has one."""
    licence = content["info"]["license"]
    return licence.get("spdx") or licence["title"]


def credit_of(content: IconSet) -> str:
    """Name, author and licence of a set, in one line."""
    info = content["info"]
    author = info["author"]
    name = f"{info['name']} ({content['prefix']})"
    return ", ".join(
        filter(None, (name, author["name"], licence_of(content), author.get("url", "")))
    )
