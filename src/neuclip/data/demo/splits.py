"""Divides the demo data into training and held-out samples, and words their captions.

Two faces are held out, and two sets of names: one of each for choices (`development`), one for the
report (`test`). Names that share an image (Latin A, Greek Alpha) stay together.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuclip.data.demo.fonts import Glyph, names_by_shared_image
from neuclip.data.outlines import floor_top1, outline

CAPTIONS = ("{c}, {style}", "{c} in {style}", "{style} {c}", "the character {c} in {style} type")
UNSEEN_FACES = {"development": "DejaVu Serif", "test": "DejaVu Serif Bold"}
UNSEEN_CHARACTERS = 600
"""Number of names in each split of unseen characters."""

SPLITS = (
    "train",
    "unseen_face_development",
    "unseen_face_test",
    "unseen_character_development",
    "unseen_character_test",
)


@dataclass(frozen=True)
class DemoSample:
    """A sample.

    Attributes:
        glyph: the image.
        caption: its text.
        class_index: position of its name among the names of its split; none in `train`.
        picture_in_train: whether `train` has the same image, under whatever name.
    """

    glyph: Glyph
    caption: str
    class_index: int | None
    picture_in_train: bool


def divide(glyphs: Sequence[Glyph], characters: int, seed: int) -> dict[str, list[DemoSample]]:
    """The samples of every split, in the order of `SPLITS` and of their shards.

    Args:
        glyphs: all drawings of all faces.
        characters: number of names in each split of unseen characters.
        seed: decides the unseen characters, the captions and the order of `train`.
    """
    known = [glyph for glyph in glyphs if glyph.face.name not in UNSEEN_FACES.values()]
    unseen = _unseen_names(glyphs, known, characters, seed)
    away = set().union(*unseen.values())
    parts = {"train": [glyph for glyph in known if glyph.name not in away]}
    parts["train"].sort(key=lambda g: random_number(seed, "order", g.face.name, g.codepoint))
    for part, face in UNSEEN_FACES.items():
        parts[f"unseen_face_{part}"] = [glyph for glyph in glyphs if glyph.face.name == face]
    for part, names in unseen.items():
        parts[f"unseen_character_{part}"] = [glyph for glyph in known if glyph.name in names]
    in_train = {glyph.png for glyph in parts["train"]}
    samples: dict[str, list[DemoSample]] = {}
    for split in SPLITS:
        members = parts[split]
        classes = {name: index for index, name in enumerate(class_names(members))}
        samples[split] = [
            DemoSample(
                glyph=glyph,
                caption=_caption(glyph, seed),
                class_index=None if split == "train" else classes[glyph.name],
                picture_in_train=glyph.png in in_train,
            )
            for glyph in members
        ]
    return samples


def _unseen_names(
    glyphs: Sequence[Glyph], known: Sequence[Glyph], wanted: int, seed: int
) -> dict[str, set[str]]:
    """At most `wanted` names for test and for development, in groups of names that share an image.

    Groups are those of all faces but the test face. The seed orders them. Each goes to test if it
    fits there, else to development.

    Args:
        glyphs: drawings of all faces.
        known: drawings of the faces in `train`, without which a name is not used.
        wanted: number of names of each.
        seed: decides the order.
    """
    drawn = {glyph.name for glyph in known}
    groups = names_by_shared_image(
        [glyph for glyph in glyphs if glyph.face.name != UNSEEN_FACES["test"]]
    )
    unseen: dict[str, set[str]] = {"test": set(), "development": set()}
    for group in sorted(groups, key=lambda group: random_number(seed, "unseen", group[0])):
        usable = drawn.intersection(group)
        for names in unseen.values():
            if len(names) + len(usable) <= wanted:
                names.update(usable)
                break
    return unseen


def floors(splits: Mapping[str, Sequence[DemoSample]]) -> dict[str, float | None]:
    """Top-1 accuracy without learning on each evaluation split: see `floor_top1`.

    The outlines leave out place and size, so a comma and an apostrophe look alike.

    Args:
        splits: as from `divide`.
    """
    glyphs: list[Glyph] = []
    members: dict[str, range] = {}
    for split, samples in splits.items():
        members[split] = range(len(glyphs), len(glyphs) + len(samples))
        glyphs += (sample.glyph for sample in samples)
    outlines = np.stack([_outline(glyph) for glyph in glyphs])
    train = members.pop("train")
    return {
        split: floor_top1(own, train, outlines, lambda at: glyphs[at].name)
        for split, own in members.items()
    }


def _outline(glyph: Glyph) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(glyph.png)) as image:
        return outline(np.asarray(image.convert("RGB")), (255, 255, 255))


def class_names(glyphs: Iterable[Glyph]) -> list[str]:
    """The distinct names of drawings, in code point order."""
    return [name for _, name in sorted({(glyph.codepoint, glyph.name) for glyph in glyphs})]


def templates(split: str, samples: Sequence[DemoSample]) -> list[str]:
    """Zero-shot prompts in the wording of the captions.

    For an unseen face, whose style is known: every caption in that style. For unseen characters:
    the first caption in each style.
    """
    styles = sorted({sample.glyph.face.style for sample in samples})
    captions = CAPTIONS if split.startswith("unseen_face_") else CAPTIONS[:1]
    return [caption.replace("{style}", style) for style in styles for caption in captions]


def random_number(seed: int, *what: str | int) -> int:
    """A random number that depends only on the seed and on `what`, on every machine."""
    text = json.dumps([seed, *what]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _caption(glyph: Glyph, seed: int) -> str:
    template = random_number(seed, "caption", glyph.face.name, glyph.codepoint) % len(CAPTIONS)
    return CAPTIONS[template].format(c=glyph.name, style=glyph.face.style)
