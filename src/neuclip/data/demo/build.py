"""The embedded data set: pictures of characters with their Unicode names, drawn from fonts.

Real image-text pairs that need no download: some 54,000 of them from the faces that matplotlib
ships, more with more fonts. `<out>/` then holds

    demo.json                     what was built: seed, size, faces, counts
    train/00000.tar ...           the pairs to train on, in an order drawn by the seed
    unseen_face/                  every character of one face that `train` never shows
    unseen_character/             600 names that `train` shows in no face (the unseen face aside)

and both evaluation splits carry `classnames.txt` and `zeroshot_classification_templates.txt` as
DataComp's do, with one `.cls` a sample. Names can share a picture (Latin A, Greek Alpha):
all names of a shared picture are held out together, so no picture of an unseen character, under
whatever name, is in `train`. A face shares some symbols with its relatives, so `unseen_face` does
show pictures known from other faces: `picture_in_train` in a sample's `.json` says which.

The same seed, fonts and libraries give the same bytes.
"""

import errno
import hashlib
import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from neuclip.data.demo.fonts import Face, Glyph, draw_face, find_faces, names_by_shared_picture
from neuclip.data.tools.writing import write_shards
from neuclip.errors import UserError
from neuclip.files import folder_when_complete

CAPTIONS = ("{c}, {style}", "{c} in {style}", "{style} {c}", "the character {c} in {style} type")
UNSEEN_FACE = "DejaVu Serif Bold"
UNSEEN_CHARACTERS = 600
SPLITS = ("train", "unseen_face", "unseen_character")

_FORMAT = 1  # of the folder: raised when the same settings would give other bytes
_SHARD_SAMPLES = 5000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Counts = dict[str, dict[str, int]]
"""What `demo.json` says of each split."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of its parts are done, and how many there are."""


@dataclass(frozen=True)
class DemoSummary:
    """What a build made or, with `reused`, found already made.

    Attributes:
        path: the folder.
        pairs: samples by split.
        classes: distinct names by split.
        faces: names of the faces drawn, the unseen one included.
        reused: the folder was complete before, with the same settings.
        seconds: how long it took.
    """

    path: Path
    pairs: dict[str, int]
    classes: dict[str, int]
    faces: tuple[str, ...]
    reused: bool
    seconds: float

    def __str__(self) -> str:
        did = "already complete, reused" if self.reused else f"built in {self.seconds:.1f} s"
        splits = ", ".join(
            f"{split} {self.pairs[split]:,} pairs of {self.classes[split]:,} names"
            for split in SPLITS
        )
        return f"{self.path}: {did}: {len(self.faces)} faces; {splits}"


@dataclass(frozen=True)
class _Settings:
    """Everything that decides the bytes, as it is written into `demo.json`."""

    size: int
    seed: int
    characters: int | None
    faces: dict[str, str]
    format: int = _FORMAT
    unicode: str = unicodedata.unidata_version


@dataclass(frozen=True)
class _Sample:
    glyph: Glyph
    caption: str
    class_index: int | None
    picture_in_train: bool


def build_demo(
    out: Path,
    *,
    fonts: Sequence[Path] = (),
    size: int = 32,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoSummary:
    """Build the embedded data set in `out`, or reuse it when it is there with the same settings.

    Args:
        out: folder to make; it appears only when it is complete.
        fonts: folders with more fonts to draw from.
        size: width and height of the pictures in pixels, at least 16.
        seed: decides the unseen characters, the wording of the captions and the order of `train`.
        overwrite: replace a demo set that was built with other settings.
        progress: told how far the build is.

    Raises:
        UserError: `out` holds something else or cannot be written, or a font folder is no use.
    """
    faces = find_faces(fonts)
    settings = _Settings(size, seed, None, {face.name: face.digest for face in faces})
    return _build(out, faces, settings, overwrite, progress)


def tiny_demo(
    out: Path, *, characters: int = 64, size: int = 32, seed: int = 0, overwrite: bool = False
) -> DemoSummary:
    """The same kind of set from a few characters: some hundred pairs in a fraction of a second.

    Args:
        out: folder to make.
        characters: how many characters of the unseen face to keep, drawn by the seed; an eighth
            of them become the unseen characters.
        size: width and height of the pictures in pixels.
        seed: as in `build_demo`.
        overwrite: as in `build_demo`.
    """
    faces = find_faces()
    settings = _Settings(size, seed, characters, {face.name: face.digest for face in faces})
    return _build(out, faces, settings, overwrite, None)


def _build(
    out: Path,
    faces: Sequence[Face],
    settings: _Settings,
    overwrite: bool,
    progress: Progress | None,
) -> DemoSummary:
    started = time.perf_counter()
    if settings.size < 16:
        raise UserError(f"--size {settings.size}: at least 16 pixels are needed to tell characters")
    if UNSEEN_FACE not in settings.faces:
        raise UserError(f"the face {UNSEEN_FACE} is missing from the fonts that matplotlib ships")
    counts = None if overwrite and _is_demo(out) else _existing_counts(out, settings)
    reused = counts is not None
    if counts is None:
        report = progress or (lambda what, done, total: None)
        glyphs = _draw_all(faces, settings, report)
        counts = _write(out, _split(glyphs, settings), settings, report)
    return DemoSummary(
        path=out,
        pairs={split: counts[split]["pairs"] for split in SPLITS},
        classes={split: counts[split]["classes"] for split in SPLITS},
        faces=tuple(settings.faces),
        reused=reused,
        seconds=time.perf_counter() - started,
    )


def _is_demo(out: Path) -> bool:
    return (out / "demo.json").is_file()


def _existing_counts(out: Path, settings: _Settings) -> Counts | None:
    """Counts of the finished set in `out`; None when there is nothing yet."""
    if not _is_demo(out):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is no demo set: choose another folder")
        return None
    try:
        found = json.loads((out / "demo.json").read_text("utf-8"))
        known, shards, counts = found["settings"], found["shards"], found["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}/demo.json is not what a build writes: {error!r}") from error
    asked = asdict(settings)
    different = [key for key in asked if known.get(key) != asked[key]]
    if different:
        shown = ", ".join(
            key if key == "faces" else f"{key} {found['settings'].get(key)} (asked: {asked[key]})"
            for key in different
        )
        raise UserError(
            f"{out} holds a demo set with other settings: {shown}. "
            "Choose another folder or ask to overwrite it"
        )
    for name, size in shards.items():
        shard = out / name
        if not shard.is_file() or shard.stat().st_size != size:
            raise UserError(f"{out} is damaged: {shard} is missing or cut: overwrite or remove it")
    return counts


def _draw_all(faces: Sequence[Face], settings: _Settings, progress: Progress) -> list[Glyph]:
    only = None
    if settings.characters is not None:
        unseen = next(face for face in faces if face.name == UNSEEN_FACE)
        drawn = sorted(unseen.names, key=lambda c: _random(settings.seed, "kept", c))
        only = set(drawn[: settings.characters])
    glyphs: list[Glyph] = []
    for done, face in enumerate(faces):
        progress(f"drawing {face.name}", done, len(faces))
        glyphs += draw_face(face, settings.size, only)
    return glyphs


def _split(glyphs: Sequence[Glyph], settings: _Settings) -> dict[str, list[_Sample]]:
    known = [glyph for glyph in glyphs if glyph.face.name != UNSEEN_FACE]
    wanted = UNSEEN_CHARACTERS
    if settings.characters is not None:
        wanted = min(wanted, settings.characters // 8)
    unseen = _held_out(known, wanted, settings.seed)
    parts = {
        "train": [glyph for glyph in known if glyph.name not in unseen],
        "unseen_face": [glyph for glyph in glyphs if glyph.face.name == UNSEEN_FACE],
        "unseen_character": [glyph for glyph in known if glyph.name in unseen],
    }
    in_train = {glyph.png for glyph in parts["train"]}
    parts["train"].sort(key=lambda g: _random(settings.seed, "order", g.face.name, g.codepoint))
    samples: dict[str, list[_Sample]] = {}
    for split, members in parts.items():
        classes = {name: index for index, name in enumerate(_class_names(members))}
        samples[split] = [
            _Sample(
                glyph=glyph,
                caption=_caption(glyph, settings.seed),
                class_index=None if split == "train" else classes[glyph.name],
                picture_in_train=glyph.png in in_train,
            )
            for glyph in members
        ]
    return samples


def _held_out(glyphs: Sequence[Glyph], wanted: int, seed: int) -> set[str]:
    """Names, `wanted` of them if that can be, in whole groups of names that share a picture."""
    groups = names_by_shared_picture(glyphs)
    held_out: set[str] = set()
    for group in sorted(groups, key=lambda group: _random(seed, "unseen", group[0])):
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    return held_out


def _caption(glyph: Glyph, seed: int) -> str:
    template = _random(seed, "caption", glyph.face.name, glyph.codepoint) % len(CAPTIONS)
    return CAPTIONS[template].format(c=glyph.name, style=glyph.face.style)


def _random(seed: int, *what: str | int) -> int:
    """A number that depends on the seed and on `what` alone, on every machine."""
    text = json.dumps([seed, *what]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _class_names(glyphs: Iterable[Glyph]) -> list[str]:
    return [name for _, name in sorted({(glyph.codepoint, glyph.name) for glyph in glyphs})]


def _templates(split: str, samples: Sequence[_Sample]) -> list[str]:
    """Zero-shot prompts, in the captions' words.

    Of the unseen face the style is known (it is what the split is about): every caption in
    that style. An unseen character comes in any style: the first caption in each of them.
    """
    styles = sorted({sample.glyph.face.style for sample in samples})
    captions = CAPTIONS if split == "unseen_face" else CAPTIONS[:1]
    return [caption.replace("{style}", style) for style in styles for caption in captions]


def _write(
    out: Path, splits: dict[str, list[_Sample]], settings: _Settings, progress: Progress
) -> Counts:
    pairs = sum(map(len, splits.values()))
    trained = {sample.glyph.name for sample in splits["train"]}
    counts: Counts = {}
    shards: dict[str, int] = {}
    try:
        with folder_when_complete(out) as folder:
            for split, samples in splits.items():
                written = sum(count["pairs"] for count in counts.values())
                progress(f"writing {split}", written, pairs)
                shards |= _write_split(folder / split, split, samples)
                names = {sample.glyph.name for sample in samples}
                counts[split] = {
                    "pairs": len(samples),
                    "classes": len(names),
                    "names_not_in_train": len(names - trained),
                    "pictures_in_train": sum(sample.picture_in_train for sample in samples),
                }
            description = {
                "settings": asdict(settings),
                "unseen_face": UNSEEN_FACE,
                "captions": CAPTIONS,
                "splits": counts,
                "shards": shards,
            }
            (folder / "demo.json").write_text(json.dumps(description, indent=1) + "\n", "utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        reason += f": {error.filename}" if error.filename else ""
        if error.errno in _NO_SPACE:
            reason += f" (about {pairs * 3500 // 2**20 + 1} MB are needed)"
        raise UserError(f"cannot write the demo set to {out}: {reason}") from error
    return counts


def _write_split(folder: Path, split: str, samples: Sequence[_Sample]) -> dict[str, int]:
    """Write one split; returns the sizes of its shards by their path below the demo set."""
    keyed = ((f"{position:08d}", sample) for position, sample in enumerate(samples))
    members = ((key, _members(key, sample)) for key, sample in keyed)
    sizes = write_shards(folder, members, _SHARD_SAMPLES)
    if split != "train":
        names = _class_names(sample.glyph for sample in samples)
        _write_lines(folder / "classnames.txt", names)
        _write_lines(folder / "zeroshot_classification_templates.txt", _templates(split, samples))
    return {f"{split}/{shard}": size for shard, size in sizes.items()}


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _members(key: str, sample: _Sample) -> dict[str, bytes]:
    glyph = sample.glyph
    record: dict[str, str | bool] = {
        "key": key,
        "codepoint": f"U+{glyph.codepoint:04X}",
        "name": glyph.name,
        "face": glyph.face.name,
        "style": glyph.face.style,
    }
    members = {"png": glyph.png, "txt": sample.caption.encode()}
    if sample.class_index is not None:
        record["picture_in_train"] = sample.picture_in_train
        members["cls"] = str(sample.class_index).encode()
    members["json"] = json.dumps(record).encode()
    return members
