"""The data set of emoji: the same emoji in the styles of a dozen vendors, captions from Unicode.

`@iconify/json` has the drawings of the vendors, `emojibase-data` the names, keywords and groups
that Unicode's CLDR gives them. Splits:

    train
    unseen_vendor_development, unseen_vendor_test   vendors that are not in `train`
    unseen_emoji_development, unseen_emoji_test     emoji that no picture of `train` shows, of words
                                                    that the names of others have

No evaluation picture resembles one of `train` closely. Skin tones are left out: they differ in
colour alone.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip.data.icons.held_out import held_out_concepts, unlike
from neuclip.data.icons.icon_collection import COLLECTION
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
from neuclip.data.outlines import floor_top1
from neuclip.data.progress import Progress
from neuclip.errors import UserError

NAMES = "emojibase-data"

TEMPLATES = (
    "{c}", "{c} emoji", "emoji of {c}", "an emoji showing {c}", "{c}, color emoji",
    "{c}, flat color emoji", "{c}, black and white emoji", "gradient color emoji of {c}",
)  # fmt: skip

_VENDORS = {  # prefix of the set, vendor in a caption, look
    "noto": ("Google Noto", "flat color"),
    "noto-v1": ("Google blob", "blob"),
    "twemoji": ("Twitter", "flat color"),
    "openmoji": ("OpenMoji", "outlined color"),
    "emojione": ("EmojiOne", "color"),
    "emojione-v1": ("EmojiOne 1", "flat color"),
    "emojione-monotone": ("EmojiOne", "black and white"),
    "fluent-emoji": ("Microsoft Fluent", "gradient color"),
    "fluent-emoji-flat": ("Microsoft Fluent", "flat color"),
    "fluent-emoji-high-contrast": ("Microsoft Fluent", "black and white"),
    "fxemoji": ("Firefox OS", "color"),
    "streamline-emojis": ("Streamline", "line color"),
}
_UNSEEN_VENDORS = {"development": ("fxemoji", "streamline-emojis"), "test": ("openmoji",)}
_LIKE = 0.985  # correlation of outlines from which two pictures count as one
_LEAST_VENDORS = 4  # of an emoji to be held out
_LEAST_USES = 3  # emoji of `train` with each word of an emoji that is held out
_MARGINS = (2, 5)  # pixels of 64
_TONE = re.compile(r"skin tone|-(?:light|medium|dark)(?:-|$)")
_ACCENTS = str.maketrans("ñôéåçãí", "noeacai")


@dataclass(frozen=True)
class EmojiSettings:
    """What decides the data, with the packages.

    Attributes:
        size: width and height of the images in pixels.
        seed: decides looks, captions, held-out emoji and order.
        emoji: number of emoji in each of the two splits of unseen emoji.
    """

    size: int = 64
    seed: int = 0
    emoji: int = 150


@dataclass(frozen=True)
class Emoji:
    """An emoji of Unicode.

    Attributes:
        label: its name.
        tags: keywords.
        group: such as "food & drink".
    """

    label: str
    tags: tuple[str, ...]
    group: str

    @property
    def words(self) -> frozenset[str]:
        """The words of the name."""
        return frozenset(re.findall(r"\w+", self.label.lower()))


@dataclass(frozen=True)
class Drawing:
    """A vendor's picture of an emoji.

    Attributes:
        set: prefix of the vendor's set.
        name: of the icon in the set.
        emoji: what it shows.
    """

    set: str
    name: str
    emoji: Emoji

    @property
    def concept(self) -> str:
        """The name of the emoji."""
        return self.emoji.label


def build_emoji(
    packages: Path,
    out: Path,
    settings: EmojiSettings,
    *,
    processes: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds the data set of emoji.

    Args:
        packages: folder with the tarballs of `npm pack`.
        out: folder to create.
        settings: what decides the data.
        processes: number of drawing processes.
        progress: called while emoji are drawn and written.

    Returns:
        Settings, packages and counts, as in `pairs.json`.

    Raises:
        UserError: a package is missing or damaged, resvg is missing, or `out` cannot be written.
    """
    check_renderer()
    check_free(out)
    collection, names = NpmPackage.find(packages, COLLECTION), NpmPackage.find(packages, NAMES)
    sets = _read_sets(collection)
    drawings, unnamed = _drawings(sets, _Unicode.read(names))
    rule = DrawingRule(settings.size, settings.seed, _MARGINS, _LIKE)
    pictures = draw_distinct(drawings, sets, rule, processes, progress)
    members = _split(pictures, settings)
    barred = frozenset(
        pictures.concept(at).lower()
        for part in _UNSEEN_VENDORS
        for at in members[f"unseen_emoji_{part}"]
    )
    splits: list[PairSplit] = []
    for name, own in members.items():
        pairs = [_pair(pictures, at, sets, barred) for at in pictures.shuffled(own)]
        if name == "train":
            splits.append(PairSplit(name, pairs))
            continue
        floor = floor_top1(own, members["train"], pictures.outlines, pictures.concept)
        splits.append(PairSplit(name, pairs, TEMPLATES, {"floor_top1": floor}))
    facts = {
        "settings": vars(settings),
        "packages": {each.name: each.version for each in (collection, names)},
        "not_drawn": pictures.not_drawn,
        "without_a_name": unnamed,
    }
    credits = [credit_of(sets[vendor]) for vendor in sorted(sets)]
    credits.append(f"names and keywords: Unicode CLDR, by {NAMES} (MIT)")
    return write_pairs(out, splits, facts, credits, progress)


def _pair(
    pictures: PictureSet[Drawing], at: int, sets: Mapping[str, IconSet], barred: frozenset[str]
) -> Pair:
    drawing = pictures.depicted[at]
    record = {
        "set": drawing.set,
        "name": key_of(drawing),
        "style": _VENDORS[drawing.set][1],
        "category": drawing.emoji.group,
        "licence": licence_of(sets[drawing.set]),
    }
    return Pair(pictures.pngs[at], caption(drawing, pictures.seed, barred), drawing.concept, record)


# reading -----------------------------------------------------------------------------------------


class _Unicode:
    """The emoji of Unicode, by their codes and by their names.

    Args:
        by_code: emoji by hexadecimal code.
    """

    def __init__(self, by_code: Mapping[str, Emoji]) -> None:
        self._by_code = by_code
        self._by_name = {_letters(emoji.label): emoji for emoji in by_code.values()}

    @classmethod
    def read(cls, package: NpmPackage) -> "_Unicode":
        """Reads emojibase's English data.

        Raises:
            UserError: the package has another layout.
        """
        messages, data = package.json("en/messages.json"), package.json("en/data.json")
        try:
            groups = {group["order"]: group["message"] for group in messages["groups"]}
            return cls(
                {
                    _code(one["hexcode"]): Emoji(
                        _plain(one["label"]),
                        tuple(_plain(tag) for tag in one.get("tags", [])),
                        groups[one["group"]],
                    )
                    for one in data
                    if one.get("group") is not None  # not a part of emoji
                }
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{package.path}: en/data.json has another layout: {error!r}"
            ) from error

    def find(self, code: str | None, name: str) -> Emoji | None:
        """An emoji by its code, or by the name of a vendor's file."""
        if code is not None and _code(code) in self._by_code:
            return self._by_code[_code(code)]
        name = re.sub(r"-\d$", "", name)
        for candidate in (
            name,
            name.replace("flag-for-", "flag-"),
            f"flag-{name}",
            f"{name}-button",
            f"{name}-face",
            name.removesuffix("-face"),
            f"person-{name}",
        ):
            found = self._by_name.get(_letters(candidate))
            if found is not None:
                return found
        return None


def _code(hexcode: str) -> str:
    """A code in lower case, without the mark that asks for a picture instead of text."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _letters(text: str) -> str:
    """The letters and digits of a name, to match names of files."""
    return re.sub(r"[^a-z0-9]", "", text.lower().translate(_ACCENTS).replace("&", "and"))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[“”\"()]", "", text)).strip()


def _read_sets(package: NpmPackage) -> dict[str, dict[str, Any]]:
    paths = {f"json/{vendor}.json" for vendor in _VENDORS}
    sets = {
        Path(path).stem: package.parsed(path, content)
        for path, content in package.read(paths.__contains__)
    }
    missing = sorted(_VENDORS.keys() - sets.keys())
    if missing:
        raise UserError(
            f"{package.path} lacks the sets {', '.join(missing)}: run `npm pack {COLLECTION}` again"
        )
    return sets


def _drawings(
    sets: Mapping[str, dict[str, Any]], unicode: _Unicode
) -> tuple[list[Drawing], dict[str, int]]:
    """The pictures that Unicode names, and the number of the others by vendor."""
    found: list[Drawing] = []
    unnamed: dict[str, int] = {}
    for vendor, content in sorted(sets.items()):
        try:
            codes = {name: code for code, name in content.get("chars", {}).items()}
            names = sorted(n for n, one in content["icons"].items() if not one.get("hidden"))
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"the set {vendor} has another layout: {error!r}") from error
        for name in names:
            emoji = unicode.find(codes.get(name), name)
            if emoji is not None:
                found.append(Drawing(vendor, name, emoji))
            elif not _TONE.search(name):
                unnamed[vendor] = unnamed.get(vendor, 0) + 1
    return found, unnamed


# choosing ----------------------------------------------------------------------------------------


def _split(pictures: PictureSet[Drawing], settings: EmojiSettings) -> dict[str, list[int]]:
    """Positions of the drawings in each split."""
    drawings, outlines = pictures.depicted, pictures.outlines
    away = {vendor for vendors in _UNSEEN_VENDORS.values() for vendor in vendors}
    usual = [at for at, each in enumerate(drawings) if each.set not in away]
    vendors: dict[str, set[str]] = defaultdict(set)
    words: dict[str, frozenset[str]] = {}
    for at in usual:
        emoji = drawings[at].emoji
        vendors[emoji.label].add(drawings[at].set)
        words[emoji.label] = emoji.words
    candidates = [
        label
        for label, own in vendors.items()
        if len(own) >= _LEAST_VENDORS and not label.startswith("flag")
    ]
    held = held_out_concepts(
        words, candidates, 2 * settings.emoji, least_uses=_LEAST_USES, seed=settings.seed
    )
    train = [at for at in usual if drawings[at].emoji.label not in held]
    known = {drawings[at].emoji.label for at in train}

    def unlike_train(wanted: Callable[[Drawing], bool]) -> list[int]:
        own = [at for at, each in enumerate(drawings) if wanted(each)]
        return unlike(own, train, outlines, _LIKE)

    members = {"train": train}
    for part, away_here in _UNSEEN_VENDORS.items():
        members[f"unseen_vendor_{part}"] = unlike_train(
            lambda each, here=away_here: each.set in here and each.emoji.label in known
        )
    for number, part in enumerate(_UNSEEN_VENDORS):
        labels = set(held[number::2])
        members[f"unseen_emoji_{part}"] = unlike_train(
            lambda each, labels=labels: each.set not in away and each.emoji.label in labels
        )
    return members


def caption(drawing: Drawing, seed: int, barred: Iterable[str]) -> str:
    """A caption, by one of a dozen templates that the seed draws.

    Args:
        drawing: what is described.
        seed: of the data.
        barred: names that no caption may use but those of their own pictures.
    """
    random = chance(seed, "caption", key_of(drawing))
    emoji, (vendor, look) = drawing.emoji, _VENDORS[drawing.set]
    label = emoji.label
    forms = [
        (2.5, label),
        (2.0, f"{label} emoji"),
        (1.0, f"emoji of {label}"),
        (0.7, f"an emoji showing {label}"),
        (1.5, f"{label}, {look} emoji"),
        (0.8, f"{look} emoji of {label}"),
        (0.8, f"{vendor} emoji: {label}"),
        (0.8, f"{label} emoji, {emoji.group}"),
    ]
    tags = [tag for tag in emoji.tags if tag.lower() not in {*barred, *emoji.words}]
    if tags:
        some = ", ".join(random.sample(tags, min(len(tags), random.randint(1, 3))))
        forms += [(2.0, f"{label}: {some}"), (1.0, f"{label} emoji ({some})")]
        forms.append((0.8, f"{some}, {label}"))
    weights, texts = zip(*forms, strict=True)
    return random.choices(texts, weights)[0]
