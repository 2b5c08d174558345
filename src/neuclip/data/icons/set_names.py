"""Names of icons as words: what an icon shows, apart from how its set draws it.

`mdi:account-arrow-left-outline` shows "account arrow left", drawn as an outline. The concept of an
icon is its words in alphabetical order, so "arrow left circle" and "circle arrow left" are one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# How the end of a name says how the icon is drawn, where the set does not list its suffixes.
STYLES = {
    "outline": "outline", "outlined": "outline", "line": "line", "linear": "linear",
    "stroke": "line", "filled": "filled", "fill": "filled", "solid": "solid", "bold": "bold",
    "thin": "thin", "light": "light", "regular": "", "duotone": "duotone", "duo": "duotone",
    "twotone": "two-tone", "broken": "broken line", "sharp": "sharp", "rounded": "rounded",
    "round": "rounded", "flat": "flat", "remix": "remix", "block": "block", "baseline": "",
}  # fmt: skip
"""A style in a name, and how a caption says it; empty: not at all."""
_NEVER_SHOWN = {"alt", "variant", "24px", "16px", "rtl", "ltr"}
# After these words a number belongs to what is shown ("dice 6"); elsewhere it counts designs.
_COUNTED = {
    "age", "angle", "bars", "battery", "box", "calendar", "circle", "column", "columns",
    "counter", "date", "degrees", "dice", "digit", "digits", "forward", "gear", "grid",
    "header", "heading", "hexagon", "hours", "keycap", "layout", "level", "looks", "minus",
    "moon", "number", "numeric", "percent", "phase", "player", "plus", "rating", "replay",
    "rewind", "rotate", "row", "rows", "seconds", "signal", "skip", "speed", "square", "stage",
    "step", "tier", "time", "timer", "wifi", "zone",
}  # fmt: skip
_COMMON_SHARE = 0.15  # an ending this frequent in a set is a style of the set


@dataclass(frozen=True)
class ParsedName:
    """A name of an icon.

    Attributes:
        words: what the icon shows.
        styles: how it is drawn, as in the name.
    """

    words: tuple[str, ...]
    styles: tuple[str, ...]

    @property
    def concept(self) -> str:
        """The identity of what is shown."""
        return concept_of(self.words)

    @property
    def said_styles(self) -> str:
        """The styles as a caption says them; empty if there are none."""
        said = (STYLES.get(style, "") for style in self.styles)
        return " ".join(dict.fromkeys(filter(None, said)))


def concept_of(words: Iterable[str]) -> str:
    """The words in alphabetical order."""
    return " ".join(sorted(words))


def split_words(name: str) -> list[str]:
    """The words of a name in lower case; a number at the end of a longer word is its own word."""
    name = re.sub(r"([a-z]{3,})(\d{1,2})$", r"\1-\2", name.lower().replace("_", "-"))
    return [word for word in re.split(r"[-\s]+", name) if word]


class SetNames:
    """Parses the names of one icon set.

    Args:
        content: an icon set in Iconify's JSON form.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._names = {name for name, icon in content["icons"].items() if not icon.get("hidden")}
        self._suffixes = _longest_first(content.get("suffixes", {}))
        self._prefixes = _longest_first(content.get("prefixes", {}))
        endings = Counter(name.rpartition("-")[2] for name in self._names)
        least = _COMMON_SHARE * len(self._names)
        self._usual = {style for style in STYLES if endings[style] > least}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def parse(self, name: str) -> ParsedName:
        """Splits a name into words and styles."""
        base, styles = name, list[str]()
        for suffix in self._suffixes:
            if base.endswith(f"-{suffix}"):
                base, styles = base.removesuffix(f"-{suffix}"), [*styles, *suffix.split("-")]
                break
        for prefix in self._prefixes:
            if base.startswith(f"{prefix}-"):
                base, styles = base.removeprefix(f"{prefix}-"), [*styles, *prefix.split("-")]
                break
        words = split_words(base)
        while len(words) > 1 and self._is_no_content(words):
            styles.append(words.pop())
        return ParsedName(tuple(words), tuple(styles))

    def _is_no_content(self, words: Sequence[str]) -> bool:
        """Whether the last word is a style, or numbers a design."""
        *before, last = words
        if last in _NEVER_SHOWN or last in self._usual:
            return True
        rest = "-".join(before)
        if last in STYLES:
            others = (f"{rest}-{style}" for style in STYLES if style != last)
            return rest in self._names or any(other in self._names for other in others)
        if last in {"f", "o"}:  # filled and outline
            return rest in self._names
        return bool(re.fullmatch(r"\d{1,2}", last)) and not (
            before[-1] in _COUNTED or before[-1].isdigit()
        )


def _longest_first(endings: Mapping[str, str]) -> list[str]:
    return sorted(filter(None, endings), key=len, reverse=True)


def spell_category(name: str) -> str:
    """A category as plain words: 'ComputerDevices' is 'computer devices'; empty if it says nothing.

    Args:
        name: as the set spells it.
    """
    name = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("/", ", ")
    name = re.sub(r"\s+", " ", re.sub(r"[-_]", " ", name)).replace(" ,", ",").strip().lower()
    return "" if name in {"other", "others", "uncategorized", "general", "common"} else name
