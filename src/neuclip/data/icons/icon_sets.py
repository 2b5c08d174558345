"""The data set of icons: pictures from some 170 open icon sets, captions from their names.

Splits:

    train
    unseen_style_development, unseen_style_test       whole sets that are not in `train`; the
                                                      classes are concepts that are
    unseen_concept_development, unseen_concept_test   concepts that no picture of `train` is named
                                                      after, of words that other names in it have

No evaluation picture resembles one of `train` closely.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip.data.icons.held_out import few_of_each, held_out_concepts, unlike
from neuclip.data.icons.icon_collection import (
    COLLECTION,
    TAGGED,
    Icon,
    known_sets,
    read_collection,
)
from neuclip.data.icons.npm_packages import NpmPackage
from neuclip.data.icons.pair_folder import Pair, PairSplit, chance, check_free, write_pairs
from neuclip.data.icons.picture_set import (
    DrawingRule,
    IconSet,
    PictureSet,
    credit_of,
    draw_distinct,
    key_of,
    licence_of,
)
from neuclip.data.icons.rendering import check_renderer
from neuclip.data.icons.set_names import concept_of, split_words
from neuclip.data.outlines import floor_top1
from neuclip.data.progress import Progress

TEMPLATES = (
    "{c}", "{c} icon", "icon of {c}", "{c}, outline icon", "{c}, solid icon", "{c}, filled icon",
    "line icon of {c}", "{c}, bold icon", "a pictogram of {c}", "symbol: {c}",
)  # fmt: skip

_UNSEEN = ("development", "test")
_PER_CONCEPT = 2  # pictures of a concept from one set
_LIKE_TRAIN = 0.93  # correlation of outlines from which a picture counts as one of `train`
_LIKE_SAME = 0.985  # and from which two pictures of a concept count as one
_FAMILIES = (3, 40)  # of the sets that draw a concept to be held out
_LEAST_PICTURES = 5  # of a concept to be held out
_LEAST_USES = 6  # concepts of `train` with each word of a concept that is held out
_PICTURES = (2, 5)  # of a class of the unseen concepts
_MARGINS = (2, 7)  # pixels of 64


@dataclass(frozen=True)
class IconSettings:
    """What decides the data, with the packages.

    Attributes:
        size: width and height of the images in pixels.
        seed: decides colours, captions, held-out concepts and order.
        max_pairs: number of training pairs at most.
        concepts: number of concepts in each of the two splits of unseen concepts.
    """

    size: int = 64
    seed: int = 0
    max_pairs: int = 150_000
    concepts: int = 800


def build_icons(
    packages: Path,
    out: Path,
    settings: IconSettings,
    *,
    processes: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds the data set of icons.

    Args:
        packages: folder with the tarballs of `npm pack`.
        out: folder to create.
        settings: what decides the data.
        processes: number of drawing processes.
        progress: called while icons are drawn and written.

    Returns:
        Settings, packages and counts, as in `pairs.json`.

    Raises:
        UserError: a package is missing or damaged, resvg is missing, or `out` cannot be written.
    """
    check_renderer()
    check_free(out)
    collection = NpmPackage.find(packages, COLLECTION)
    tagged = [package for name in TAGGED if (package := NpmPackage.newest(packages, name))]
    icons, sets = read_collection(collection, tagged)
    rule = DrawingRule(settings.size, settings.seed, _MARGINS, _LIKE_SAME)
    pictures = draw_distinct(
        _few_of_each_set(icons, settings.seed), sets, rule, processes, progress
    )
    splits = _Splits(pictures, settings)
    facts = {
        "settings": vars(settings),
        "packages": {each.name: each.version for each in (collection, *tagged)},
        "not_drawn": pictures.not_drawn,
    }
    credits = [credit_of(sets[name]) for name in sorted({icon.set for icon in pictures.depicted})]
    pairs = [splits.of_pairs(name, sets) for name in splits.members]
    return write_pairs(out, pairs, facts, credits, progress)


def _few_of_each_set(icons: Sequence[Icon], seed: int) -> list[Icon]:
    """A few pictures of a concept from each set, of styles that differ where they can."""
    ordered = sorted(icons, key=lambda icon: chance(seed, "choose", key_of(icon)).random())
    chosen = few_of_each(
        range(len(ordered)),
        lambda at: f"{ordered[at].set}:{ordered[at].concept}",
        lambda at: ordered[at].look,
        least=1,
        most=_PER_CONCEPT,
    )
    return sorted((ordered[at] for at in chosen), key=key_of)


class _Splits:
    """Divides the icons; `members` has the positions of each split."""

    def __init__(self, pictures: PictureSet[Icon], settings: IconSettings) -> None:
        self._pictures, self._icons = pictures, pictures.depicted
        icons, styles = self._icons, known_sets()["unseen_styles"]
        away = {name for part in _UNSEEN for name in styles[part]}
        seen_sets = [at for at, icon in enumerate(icons) if icon.set not in away]
        held = self._held_out(seen_sets, 2 * settings.concepts)
        self.barred = frozenset(held)
        train = [at for at in seen_sets if icons[at].concept not in self.barred]
        train = sorted(pictures.shuffled(train)[: settings.max_pairs])
        self.members: dict[str, list[int]] = {"train": train}
        known = self._families(train)
        for part in _UNSEEN:
            self.members[f"unseen_style_{part}"] = self._unlike_train(
                at
                for at, icon in enumerate(icons)
                if icon.set in styles[part] and len(known[icon.concept]) >= _FAMILIES[0]
            )
        for number, part in enumerate(_UNSEEN):
            own = set(held[number::2])
            fresh = self._unlike_train(at for at in seen_sets if icons[at].concept in own)
            least, most = _PICTURES
            self.members[f"unseen_concept_{part}"] = few_of_each(
                pictures.shuffled(fresh),
                pictures.concept,
                lambda at: icons[at].set,
                least=least,
                most=most,
            )

    def of_pairs(self, name: str, sets: Mapping[str, IconSet]) -> PairSplit:
        """A split with its captions."""
        members, pictures = self.members[name], self._pictures
        names = _class_names([self._icons[at] for at in members])
        pairs = [
            Pair(
                pictures.pngs[at],
                caption(icon, sets[icon.set]["info"]["name"], pictures.seed, self.barred),
                names[icon.concept],
                {
                    "set": icon.set,
                    "name": key_of(icon),
                    "style": icon.look,
                    "category": icon.category,
                    "licence": licence_of(sets[icon.set]),
                },
            )
            for at in pictures.shuffled(members)
            for icon in [self._icons[at]]
        ]
        if name == "train":
            return PairSplit(name, pairs)
        floor = floor_top1(members, self.members["train"], pictures.outlines, pictures.concept)
        return PairSplit(name, pairs, TEMPLATES, {"floor_top1": floor})

    def _held_out(self, members: Sequence[int], count: int) -> list[str]:
        families = self._families(members)
        pictures = Counter(self._icons[at].concept for at in members)
        words = {self._icons[at].concept: self._icons[at].parsed.words for at in members}
        least, most = _FAMILIES
        candidates = [
            concept
            for concept, own in words.items()
            if least <= len(families[concept]) <= most
            and pictures[concept] >= _LEAST_PICTURES
            and all(re.fullmatch(r"[a-z]{2,}", word) for word in own)
        ]
        return held_out_concepts(
            words, candidates, count, least_uses=_LEAST_USES, seed=self._pictures.seed
        )

    def _families(self, members: Sequence[int]) -> dict[str, set[str]]:
        """The families of sets that draw each concept: `fa6-solid` and `fa` are one family."""
        families: dict[str, set[str]] = defaultdict(set)
        for at in members:
            icon = self._icons[at]
            families[icon.concept].add(re.split(r"[-\d]", icon.set)[0])
        return families

    def _unlike_train(self, members: Iterator[int]) -> list[int]:
        return unlike(list(members), self.members["train"], self._pictures.outlines, _LIKE_TRAIN)


def _class_names(icons: Sequence[Icon]) -> dict[str, str]:
    """How each concept is mostly said."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for icon in icons:
        said[icon.concept][icon.said] += 1
    return {
        concept: min(counts, key=lambda text: (-counts[text], text))
        for concept, counts in said.items()
    }


def caption(icon: Icon, title: str, seed: int, barred: frozenset[str]) -> str:
    """A caption, by one of a dozen templates that the seed draws.

    Args:
        icon: what is described.
        title: of its set.
        seed: of the data.
        barred: concepts that no caption may name but those of their own pictures.
    """
    random = chance(seed, "caption", key_of(icon))
    said, look = icon.said, icon.look
    forms: list[tuple[float, str]] = [
        (2.0, said),
        (2.0, f"{said} icon"),
        (1.0, f"icon of {said}"),
        (0.6, f"{title} icon: {said}"),
        (0.4, f"a pictogram of {said}"),
        (0.4, f"symbol: {said}"),
    ]
    if look:
        forms += [(2.5, f"{said}, {look} icon"), (1.5, f"{look} icon of {said}")]
    if icon.category:
        forms.append((1.2, f"{said} icon, {icon.category}"))
    aliases = [name for name in icon.aliases if concept_of(name.split()) not in barred]
    if aliases:
        alias = random.choice(aliases)
        forms += [(1.0, f"{said}, also {alias}"), (0.5, f"{alias} icon ({said})")]
    terms = [term for term in icon.terms if concept_of(split_words(term)) not in barred]
    if terms:
        some = ", ".join(random.sample(terms, min(len(terms), random.randint(1, 3))))
        forms += [(2.0, f"{said}: {some}"), (1.0, f"{said} icon ({some})")]
    weights, texts = zip(*forms, strict=True)
    return random.choices(texts, weights)[0]
