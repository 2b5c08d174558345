"""Builds the demo data: images of characters with their Unicode names, drawn from fonts.

They are image-text pairs that need no download: about 54,000 from the faces that come with
matplotlib, and more with more fonts. The folder then contains

    demo.json                       seed, size, faces, counts and accuracies without learning
    train/00000.tar ...             the training pairs, shuffled by the seed
    unseen_face_development/        all characters of one face that is not in `train`
    unseen_face_test/               the same of another face
    unseen_character_development/   600 names that are not in `train`, in the faces of `train`
    unseen_character_test/          600 others

Choices are made on `development`, reports on `test`. The evaluation splits have `classnames.txt`,
`zeroshot_classification_templates.txt` and one `.cls` per sample, as DataComp's sets do. Names can
share an image (Latin A, Greek Alpha): all names of a shared image are held out together, so no
image of an unseen character is in `train` or in the other split under another name. A face shares
some symbols with related faces, so an unseen face does contain images that are in `train`:
`picture_in_train` in the `.json` of a sample marks them.

The same seed, fonts and libraries give the same bytes.
"""

import errno
import json
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuclip.data.demo.fonts import Face, Glyph, draw_face, find_faces
from neuclip.data.demo.splits import (
    CAPTIONS,
    SPLITS,
    UNSEEN_CHARACTERS,
    UNSEEN_FACES,
    DemoSample,
    class_names,
    divide,
    floors,
    random_number,
    templates,
)
from neuclip.data.progress import Progress
from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError, quantity
from neuclip.files import folder_when_complete

_FORMAT = 2  # version of the folder, to be raised when the same settings give other bytes
_REPLACE = "remove the folder (`neuclip data demo` does so with --overwrite)"
_SHARD_SAMPLES = 5000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Facts = dict[str, dict[str, Any]]
"""The counts of each split in `demo.json`, and its accuracy without learning."""


@dataclass(frozen=True)
class DemoSummary:
    """A demo data set.

    Attributes:
        path: the folder.
        pairs: number of samples by split.
        classes: number of distinct names by split.
        floors: top-1 accuracy without learning, of the splits where outlines can tell.
        faces: names of the faces, including the unseen ones.
        reused: whether the folder was complete before, with the same settings.
        seconds: duration of the build in seconds.
    """

    path: Path
    pairs: dict[str, int]
    classes: dict[str, int]
    floors: dict[str, float]
    faces: tuple[str, ...]
    reused: bool
    seconds: float

    def __str__(self) -> str:
        did = "already complete, reused" if self.reused else f"built in {self.seconds:.1f} s"
        splits = ", ".join(
            f"{split} {self.pairs[split]:,} pairs of {self.classes[split]:,} names"
            for split in SPLITS
        )
        return f"{self.path}: {did}: {quantity(len(self.faces), 'face')}; {splits}"


@dataclass(frozen=True)
class _Settings:
    """Everything that decides the bytes, as stored in `demo.json`."""

    size: int
    seed: int
    characters: int | None
    faces: dict[str, str]
    format: int = _FORMAT
    unicode: str = unicodedata.unidata_version


def build_demo(
    out: Path,
    *,
    fonts: Sequence[Path] = (),
    size: int = 32,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoSummary:
    """Builds the demo data in `out`, or reuses a build with the same settings.

    Args:
        out: folder to create; it appears when it is complete.
        fonts: folders with additional fonts.
        size: width and height of the images in pixels, at least 16.
        seed: decides the unseen characters, the wording of the captions and the order of `train`.
        overwrite: replace demo data with other settings.
        progress: called for each face and each split.

    Raises:
        UserError: `out` has other content or is not writable, or a font folder has no usable face.
    """
    faces = find_faces(fonts)
    settings = _Settings(size, seed, None, {face.name: face.digest for face in faces})
    return _build(out, faces, settings, overwrite, progress)


def tiny_demo(
    out: Path, *, characters: int = 64, size: int = 32, seed: int = 0, overwrite: bool = False
) -> DemoSummary:
    """Builds demo data from a few characters: some hundred pairs in a fraction of a second.

    Args:
        out: folder to create.
        characters: number of characters of the test face to keep; an eighth of them become the
            unseen characters for development, and an eighth those for test.
        size: width and height of the images in pixels.
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
        raise UserError(f"--size {settings.size}: characters need at least 16 pixels")
    missing = [face for face in UNSEEN_FACES.values() if face not in settings.faces]
    if missing:
        raise UserError(
            f"the face {missing[0]} is missing from matplotlib's fonts: reinstall matplotlib"
        )
    counts = None if overwrite and _is_demo(out) else _existing_counts(out, settings)
    reused = counts is not None
    if counts is None:
        report = progress or (lambda what, done, total: None)
        glyphs = _draw_all(faces, settings, report)
        unseen = UNSEEN_CHARACTERS
        if settings.characters is not None:
            unseen = min(unseen, settings.characters // 8)
        splits = divide(glyphs, unseen, settings.seed)
        report("comparing outlines", 0, 1)
        counts = _write(out, splits, floors(splits), settings, report)
    return DemoSummary(
        path=out,
        pairs={split: counts[split]["pairs"] for split in SPLITS},
        classes={split: counts[split]["classes"] for split in SPLITS},
        floors={
            split: floor
            for split in SPLITS
            if (floor := counts[split].get("floor_top1")) is not None
        },
        faces=tuple(settings.faces),
        reused=reused,
        seconds=time.perf_counter() - started,
    )


def _is_demo(out: Path) -> bool:
    return (out / "demo.json").is_file()


def _existing_counts(out: Path, settings: _Settings) -> Facts | None:
    """Facts of the complete demo data in `out`; None if there are none yet."""
    if not _is_demo(out):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is not demo data: choose another folder")
        return None
    try:
        found = json.loads((out / "demo.json").read_text("utf-8"))
        known, shards, counts = found["settings"], found["shards"], found["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}/demo.json is invalid ({error!r}): remove the folder") from error
    asked = asdict(settings)
    different = [key for key in asked if known.get(key) != asked[key]]
    if different:
        shown = ", ".join(
            key if key == "faces" else f"{key} {found['settings'].get(key)} (now: {asked[key]})"
            for key in different
        )
        raise UserError(
            f"{out} contains demo data with other settings: {shown}. "
            f"Choose another folder, or {_REPLACE}"
        )
    for name, size in shards.items():
        shard = out / name
        if not shard.is_file() or shard.stat().st_size != size:
            raise UserError(f"{out} is incomplete: {shard} is missing or truncated: {_REPLACE}")
    return counts


def _draw_all(faces: Sequence[Face], settings: _Settings, progress: Progress) -> list[Glyph]:
    only = None
    if settings.characters is not None:
        unseen = next(face for face in faces if face.name == UNSEEN_FACES["test"])
        drawn = sorted(unseen.names, key=lambda c: random_number(settings.seed, "kept", c))
        only = set(drawn[: settings.characters])
    glyphs: list[Glyph] = []
    for done, face in enumerate(faces):
        progress(f"drawing {face.name}", done, len(faces))
        glyphs += draw_face(face, settings.size, only)
    return glyphs


def _write(
    out: Path,
    splits: dict[str, list[DemoSample]],
    floor: dict[str, float | None],
    settings: _Settings,
    progress: Progress,
) -> Facts:
    pairs = sum(map(len, splits.values()))
    trained = {sample.glyph.name for sample in splits["train"]}
    counts: Facts = {}
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
                if split in floor:
                    counts[split]["floor_top1"] = floor[split]
            description = {
                "settings": asdict(settings),
                "unseen_faces": UNSEEN_FACES,
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
        raise UserError(f"cannot write the demo data to {out}: {reason}") from error
    return counts


def _write_split(folder: Path, split: str, samples: Sequence[DemoSample]) -> dict[str, int]:
    """Writes one split; returns the sizes of its shards by their path relative to the data."""
    keyed = ((f"{position:08d}", sample) for position, sample in enumerate(samples))
    members = ((key, _members(key, sample)) for key, sample in keyed)
    sizes = write_shards(folder, members, _SHARD_SAMPLES)
    if split != "train":
        names = class_names(sample.glyph for sample in samples)
        _write_lines(folder / "classnames.txt", names)
        _write_lines(folder / "zeroshot_classification_templates.txt", templates(split, samples))
    return {f"{split}/{shard}": size for shard, size in sizes.items()}


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _members(key: str, sample: DemoSample) -> dict[str, bytes]:
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
