"""The icons of Iconify's collection, with what people wrote about them.

`@iconify/json` has the drawings, names, aliases and categories; the packages in `TAGGED` add search
terms. Logos, flags and emoji are left out: their names do not describe a drawing. So are sets whose
licence forbids commercial use.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.data.icons.npm_packages import NpmPackage
from neuclip.data.icons.picture_set import licence_of
from neuclip.data.icons.set_names import ParsedName, SetNames, concept_of, spell_category
from neuclip.errors import UserError

COLLECTION = "@iconify/json"
TAGGED = ("lucide-static", "@tabler/icons", "ionicons", "@primer/octicons", "healthicons")
"""Packages with search terms, which are used if they are there."""

_LONGEST = 6  # words of a name


@cache
def known_sets() -> dict[str, Any]:
    """What is known of the sets beside their content; see `icon_sets.yaml`."""
    path = files("neuclip.data.icons") / "icon_sets.yaml"
    known: dict[str, Any] = read_yaml_text(path.read_bytes(), str(path))
    looks = {name: look for look, names in known["looks"].items() for name in names}
    return {**known, "looks": looks}


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
    def concept(self) -> str:
        """The identity of what it shows."""
        return self.parsed.concept

    @property
    def said(self) -> str:
        """What it shows."""
        return " ".join(self.parsed.words)

    @property
    def look(self) -> str:
        """How it is drawn, in words; empty if nothing is known."""
        return self.parsed.said_styles or known_sets()["looks"].get(self.set, "")


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


def read_collection(
    package: NpmPackage, tagged: Sequence[NpmPackage]
) -> tuple[list[Icon], dict[str, dict[str, Any]]]:
    """Reads all icons that can be used.

    Args:
        package: Iconify's collection.
        tagged: packages with search terms.

    Returns:
        The icons, and their sets by prefix.

    Raises:
        UserError: a package is damaged or has another layout.
    """
    terms = _search_terms(tagged)
    icons: list[Icon] = []
    sets: dict[str, dict[str, Any]] = {}
    unused = {
        f"json/{prefix}.json" for prefix in (*known_sets()["left_out"], *known_sets()["relatives"])
    }
    for path, content in package.read(lambda path: _is_set(path) and path not in unused):
        one = package.parsed(path, content)
        try:
            if _is_used(one):
                icons += _icons_of(one, terms.get(one["prefix"], {}))
                sets[one["prefix"]] = one
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{package.path}: {path} is not an icon set of a known form: {error!r}"
            ) from error
    if not icons:
        raise UserError(
            f"{package.path} has no icon sets in json/: run `npm pack {COLLECTION}` again"
        )
    return icons, sets


def _is_set(path: str) -> bool:
    return re.fullmatch(r"json/[^/]+\.json", path) is not None


def _is_used(one: Mapping[str, Any]) -> bool:
    category = one["info"].get("category")
    return category not in known_sets()["categories_left_out"] and "-NC" not in licence_of(one)


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
