"""The data set of icons: pictures from some 150 open icon sets, captions from their names.

`@iconify/json` has the drawings, and what people wrote about them: names, aliases, categories. The
packages in `TAGGED` add search terms where they lie beside it. Splits:

    train
    unseen_style_development, unseen_style_test       whole sets that are not in `train`; the
                                                      classes are concepts that are
    unseen_concept_development, unseen_concept_test   concepts that no picture of `train` is named
                                                      after, of words that other names in it have

No evaluation picture resembles one of `train` closely. Logos, flags and emoji are left out: their
names do not describe a drawing. So are sets whose licence forbids commercial use.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.data.icons.held_out import few_of_each, floor_top1, held_out_concepts, unlike
from neuclip.data.icons.npm_packages import NpmPackage
from neuclip.data.icons.outlines import distinct
from neuclip.data.icons.pair_folder import Pair, PairSplit, chance, check_free, write_pairs
from neuclip.data.icons.rendering import Drawings, Look, Svg, check_renderer, draw_all
from neuclip.data.icons.set_names import (
    ParsedName,
    SetNames,
    concept_of,
    spell_category,
    split_words,
)
from neuclip.data.progress import Progress
from neuclip.errors import UserError

COLLECTION = "@iconify/json"
TAGGED = ("lucide-static", "@tabler/icons", "ionicons", "@primer/octicons", "healthicons")
"""Packages with search terms, which are used if they are there."""

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
_LONGEST = 6  # words


@cache
def _known() -> dict[str, Any]:
    """What is known of the sets beside their content; see `icon_sets.yaml`."""
    path = files("neuclip.data.icons") / "icon_sets.yaml"
    known: dict[str, Any] = read_yaml_text(path.read_bytes(), str(path))
    looks = {name: look for look, names in known["looks"].items() for name in names}
    return {**known, "looks": looks}


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


@dataclass(frozen=True)
class Icon:
    """An icon, before it is drawn.

    Attributes:
        set: prefix of its set.
        name: in the set.
        parsed: words and styles of the name.
        category: in the set; empty if there is none.
        aliases: other names, as words.
        terms: search terms.
    """

    set: str
    name: str
    parsed: ParsedName
    category: str = ""
    aliases: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Set and name, as Iconify writes them."""
        return f"{self.set}:{self.name}"

    @property
    def said(self) -> str:
        """What it shows."""
        return " ".join(self.parsed.words)

    @property
    def look(self) -> str:
        """How it is drawn, in words; empty if nothing is known."""
        return self.parsed.said_styles or _known()["looks"].get(self.set, "")


@dataclass
class _Collection:
    """All icons that can be used, and what is known of their sets."""

    icons: list[Icon] = field(default_factory=list[Icon])
    sets: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


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
    tagged = [NpmPackage.find(packages, name) for name in TAGGED if _has(packages, name)]
    found = _read(collection, _search_terms(tagged))
    icons = _few_of_each_set(found.icons, settings.seed)
    drawn = draw_all(
        [_drawing_of(icon, found.sets, settings.seed) for icon in icons],
        settings.size,
        processes,
        progress,
    )
    kept = _distinct(icons, drawn, settings.seed)
    icons, pngs = [icons[at] for at in kept], [drawn.pngs[at] for at in kept]
    splits = _Splits(icons, drawn.outlines[kept], found.sets, settings)
    pairs = [splits.of_pairs(name, members, pngs) for name, members in splits.members.items()]
    facts = {
        "settings": vars(settings),
        "packages": {each.name: each.version for each in (collection, *tagged)},
        "not_drawn": {reason: len(members) for reason, members in drawn.failures.items()},
    }
    used = {icon.set for icon in icons}
    credits = [_credit(found.sets[name]["info"], name) for name in sorted(used)]
    return write_pairs(out, pairs, facts, credits, progress)


def _has(packages: Path, name: str) -> bool:
    try:
        NpmPackage.find(packages, name)
    except UserError:
        return False
    return True


def _credit(info: Mapping[str, Any], prefix: str) -> str:
    author, licence = info["author"], info["license"]
    words = (
        f"{info['name']} ({prefix})",
        author["name"],
        licence.get("spdx") or licence["title"],
        author.get("url", ""),
    )
    return ", ".join(filter(None, words))


# reading -----------------------------------------------------------------------------------------


def _search_terms(packages: Sequence[NpmPackage]) -> dict[str, dict[str, list[str]]]:
    """Search terms by set and name without style."""
    readers: dict[str, tuple[str, str, Callable[[Any], dict[str, list[str]]]]] = {
        "lucide-static": ("lucide", "tags.json", dict),
        "@tabler/icons": (
            "tabler",
            "icons.json",
            lambda icons: {name: one.get("tags", []) for name, one in icons.items()},
        ),
        "ionicons": (
            "ion",
            "dist/ionicons.json",
            lambda content: {one["name"]: one["tags"] for one in content["icons"]},
        ),
        "@primer/octicons": (
            "octicon",
            "build/data.json",
            lambda icons: {name: one["keywords"] for name, one in icons.items()},
        ),
        "healthicons": (
            "healthicons",
            "public/icons/meta-data.json",
            lambda icons: {
                one["id"].replace("_", "-"): [one["title"], *one["tags"]] for one in icons
            },
        ),
    }
    terms: dict[str, dict[str, list[str]]] = {}
    for package in packages:
        prefix, path, read = readers[package.name]
        try:
            terms[prefix] = read(package.json(path))
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{package.path}: {path} has another layout: {error!r}") from error
    return terms


def _read(package: NpmPackage, terms: Mapping[str, Mapping[str, list[str]]]) -> _Collection:
    found = _Collection()
    unused = {f"json/{prefix}.json" for prefix in (*_known()["left_out"], *_known()["relatives"])}
    for path, content in package.read(lambda path: _is_set(path) and path not in unused):
        one = package.parsed(path, content)
        try:
            if _is_used(one):
                found.icons += _icons_of(one, terms.get(one["prefix"], {}))
                found.sets[one["prefix"]] = one
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{package.path}: {path} is not an icon set of a known form: {error!r}"
            ) from error
    if not found.icons:
        raise UserError(
            f"{package.path} has no icon sets in json/: run `npm pack {COLLECTION}` again"
        )
    return found


def _is_set(path: str) -> bool:
    return re.fullmatch(r"json/[^/]+\.json", path) is not None


def _is_used(one: Mapping[str, Any]) -> bool:
    info = one["info"]
    licence = info["license"].get("spdx") or info["license"]["title"]
    return info.get("category") not in _known()["categories_left_out"] and "-NC" not in licence


def _icons_of(one: Mapping[str, Any], terms: Mapping[str, list[str]]) -> Iterator[Icon]:
    """The icons of a set whose names can be read."""
    prefix, names = one["prefix"], SetNames(one)
    categories: dict[str, str] = {}
    for category, members in one.get("categories", {}).items():
        for name in members:
            categories.setdefault(name, spell_category(category))
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, facts in one.get("aliases", {}).items():
        if not facts.keys() & {"rotate", "hFlip", "vFlip"}:
            aliases[facts["parent"]].append(alias)
    for name in names:
        parsed = names.parse(name)
        if not _is_plain(parsed):
            continue
        stem = "-".join(parsed.words)
        yield Icon(
            prefix,
            name,
            parsed,
            categories.get(name, ""),
            _other_names(parsed, [names.parse(alias) for alias in sorted(aliases[name])]),
            _plain_terms(parsed, [*terms.get(name, []), *terms.get(stem, [])]),
        )


def _is_plain(parsed: ParsedName) -> bool:
    """Whether the words can be read: few, no codes, not only a number or a letter."""
    words, joined = parsed.words, "".join(parsed.words)
    coded = any(re.search(r"[a-z]{16,}|\d{4,}|[0-9a-f]{6,}\d", word) for word in words)
    brand = len(words) > 1 and bool({words[0], words[-1]} & {"logo", "brand"})
    return (
        len(words) <= _LONGEST
        and len(joined) >= 2
        and joined.isascii()
        and not joined.isdigit()
        and not coded
        and not brand
    )


def _other_names(parsed: ParsedName, aliases: Sequence[ParsedName]) -> tuple[str, ...]:
    said = (" ".join(alias.words) for alias in aliases if alias.concept != parsed.concept)
    return tuple(dict.fromkeys(said))


def _plain_terms(parsed: ParsedName, terms: Sequence[object]) -> tuple[str, ...]:
    said = (re.sub(r"[_-]", " ", str(term).lower()).strip() for term in terms)
    return tuple(
        dict.fromkeys(
            term
            for term in said
            if re.fullmatch(r"[a-z][a-z ]{1,24}", term)
            and concept_of(term.split()) != parsed.concept
        )
    )


# choosing ----------------------------------------------------------------------------------------


def _few_of_each_set(icons: Sequence[Icon], seed: int) -> list[Icon]:
    """A few pictures of a concept from each set, of styles that differ where they can."""
    groups: dict[tuple[str, str], list[Icon]] = defaultdict(list)
    for icon in icons:
        groups[icon.set, icon.parsed.concept].append(icon)
    chosen: list[Icon] = []
    for members in groups.values():
        members.sort(key=lambda icon: chance(seed, "choose", icon.key).random())
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, int]] = []
        for number, icon in enumerate(members):
            ranked.append((seen[icon.look], number))
            seen[icon.look] += 1
        chosen += [members[number] for _, number in sorted(ranked)[:_PER_CONCEPT]]
    return sorted(chosen, key=lambda icon: icon.key)


def _drawing_of(icon: Icon, sets: Mapping[str, dict[str, Any]], seed: int) -> tuple[Svg, Look]:
    content = sets[icon.set]
    one_colour = not content["info"].get("palette")
    random = chance(seed, "look", icon.key)
    return Svg.of_set(content, icon.name), Look.draw(random, _MARGINS, one_colour=one_colour)


def _distinct(icons: Sequence[Icon], drawn: Drawings, seed: int) -> list[int]:
    """Icons that could be drawn, without those that look like another one of their concept."""
    failed = {at for members in drawn.failures.values() for at in members}
    order = sorted(
        (at for at in range(len(icons)) if at not in failed),
        key=lambda at: chance(seed, "first", icons[at].key).random(),
    )
    groups: dict[str, list[int]] = defaultdict(list)
    for at in order:
        groups[icons[at].parsed.concept].append(at)
    return distinct(groups.values(), drawn.outlines, _LIKE_SAME)


class _Splits:
    """Divides the icons; `members` has the positions of each split."""

    def __init__(
        self,
        icons: Sequence[Icon],
        outlines: NDArray[np.uint8],
        sets: Mapping[str, dict[str, Any]],
        settings: IconSettings,
    ) -> None:
        self._icons, self._outlines, self._sets = icons, outlines, sets
        self._seed = settings.seed
        styles = _known()["unseen_styles"]
        away = {name for part in _UNSEEN for name in styles[part]}
        seen_sets = [at for at, icon in enumerate(icons) if icon.set not in away]
        held = self._held_out(seen_sets, 2 * settings.concepts)
        self.barred = frozenset(held)
        train = [at for at in seen_sets if icons[at].parsed.concept not in self.barred]
        train = sorted(self._shuffled(train)[: settings.max_pairs])
        self.members: dict[str, list[int]] = {"train": train}
        known = self._families(train)
        for part in _UNSEEN:
            self.members[f"unseen_style_{part}"] = self._unlike_train(
                at
                for at, icon in enumerate(icons)
                if icon.set in styles[part] and len(known[icon.parsed.concept]) >= _FAMILIES[0]
            )
        for number, part in enumerate(_UNSEEN):
            own = set(held[number::2])
            fresh = self._unlike_train(at for at in seen_sets if icons[at].parsed.concept in own)
            least, most = _PICTURES
            self.members[f"unseen_concept_{part}"] = few_of_each(
                self._shuffled(fresh),
                self._concept,
                lambda at: icons[at].set,
                least=least,
                most=most,
            )

    def of_pairs(self, name: str, members: Sequence[int], pngs: Sequence[bytes]) -> PairSplit:
        """A split with its captions."""
        icons = [self._icons[at] for at in members]
        names = _class_names(icons)
        pairs = {
            at: Pair(
                pngs[at],
                caption(icon, self._sets[icon.set]["info"]["name"], self._seed, self.barred),
                names[icon.parsed.concept],
                self._record(icon),
            )
            for at, icon in zip(members, icons, strict=True)
        }
        ordered = [pairs[at] for at in self._shuffled(members)]
        if name == "train":
            return PairSplit(name, ordered)
        floor = floor_top1(members, self.members["train"], self._outlines, self._concept)
        return PairSplit(name, ordered, TEMPLATES, {"floor_top1": floor})

    def _concept(self, at: int) -> str:
        return self._icons[at].parsed.concept

    def _record(self, icon: Icon) -> dict[str, Any]:
        licence = self._sets[icon.set]["info"]["license"]
        return {
            "set": icon.set,
            "name": icon.key,
            "style": icon.look,
            "category": icon.category,
            "licence": licence.get("spdx") or licence["title"],
        }

    def _held_out(self, members: Sequence[int], count: int) -> list[str]:
        families = self._families(members)
        pictures = Counter(self._icons[at].parsed.concept for at in members)
        words = {self._icons[at].parsed.concept: self._icons[at].parsed.words for at in members}
        least, most = _FAMILIES
        candidates = [
            concept
            for concept, own in words.items()
            if least <= len(families[concept]) <= most
            and pictures[concept] >= _LEAST_PICTURES
            and all(re.fullmatch(r"[a-z]{2,}", word) for word in own)
        ]
        return held_out_concepts(words, candidates, count, least_uses=_LEAST_USES, seed=self._seed)

    def _families(self, members: Sequence[int]) -> dict[str, set[str]]:
        """The families of sets that draw each concept: `fa6-solid` and `fa` are one family."""
        families: dict[str, set[str]] = defaultdict(set)
        for at in members:
            icon = self._icons[at]
            families[icon.parsed.concept].add(re.split(r"[-\d]", icon.set)[0])
        return families

    def _unlike_train(self, members: Iterator[int]) -> list[int]:
        return unlike(list(members), self.members["train"], self._outlines, _LIKE_TRAIN)

    def _shuffled(self, members: Sequence[int]) -> list[int]:
        return sorted(
            members, key=lambda at: chance(self._seed, "order", self._icons[at].key).random()
        )


def _class_names(icons: Sequence[Icon]) -> dict[str, str]:
    """How each concept is mostly said."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for icon in icons:
        said[icon.parsed.concept][icon.said] += 1
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
    random = chance(seed, "caption", icon.key)
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
