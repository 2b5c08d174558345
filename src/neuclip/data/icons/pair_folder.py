"""A folder of image-text pairs with splits: tar shards, class names, credits and facts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from neuclip.data.progress import Progress
from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError
from neuclip.files import folder_when_complete

FACTS = "pairs.json"
"""The file with the settings, packages and counts of a folder of pairs."""

_SHARD_SAMPLES = 5000


def chance(*key: object) -> Random:
    """A random generator that depends on the key only, on every machine."""
    return Random(json.dumps([str(part) for part in key]))


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Attributes:
        png: the image file.
        caption: one line.
        concept: what the image shows, as a class name.
        record: content of the `.json` of the sample.
    """

    png: bytes
    caption: str
    concept: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class PairSplit:
    """A split of the data.

    Attributes:
        name: of its folder.
        pairs: in the order of the shards.
        templates: prompts for zero-shot classification over its concepts; empty: a training split.
        facts: further counts to report.
    """

    name: str
    pairs: Sequence[Pair]
    templates: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def counts(self) -> dict[str, Any]:
        """Numbers that describe the split."""
        shown = Counter(pair.concept for pair in self.pairs)
        captions = Counter(pair.caption for pair in self.pairs)
        repeated = sum(number for number in captions.values() if number > 1)
        words = sum(len(pair.caption.split()) for pair in self.pairs)
        return {
            "pairs": len(self.pairs),
            "concepts": len(shown),
            "sets": len({pair.record["set"] for pair in self.pairs}),
            "repeated_captions": repeated,
            "words_per_caption": round(words / max(1, len(self.pairs)), 2),
            "licences": dict(Counter(pair.record["licence"] for pair in self.pairs).most_common()),
            **self.facts,
        }


def check_free(out: Path) -> None:
    """Checks before the work that a folder can be created.

    Raises:
        UserError: it exists and is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists: choose another folder, or remove it")


def write_pairs(
    out: Path,
    splits: Sequence[PairSplit],
    facts: Mapping[str, Any],
    credits: Iterable[str],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the splits; the folder appears when it is complete.

    Args:
        out: folder to create.
        splits: each becomes a folder of tar shards.
        facts: settings and packages, for `pairs.json`.
        credits: lines of `CREDITS.md`.
        progress: called for each split.

    Returns:
        The content of `pairs.json`.

    Raises:
        UserError: a split is empty, or the folder cannot be written.
    """
    for split in splits:
        if not split.pairs:
            raise UserError(
                f"no picture is left for {split.name}: the packages have too few sets, or too few "
                "concepts that several sets draw"
            )
    described: dict[str, Any] = {**facts, "splits": {}}
    try:
        with folder_when_complete(out) as folder:
            for number, split in enumerate(splits):
                if progress is not None:
                    progress(f"writing {split.name}", number, len(splits))
                _write_split(folder / split.name, split)
                described["splits"][split.name] = split.counts()
            described["sha256"] = digest(folder)
            text = "# Credits\n\n" + "".join(f"- {line}\n" for line in credits)
            (folder / "CREDITS.md").write_text(text, "utf-8")
            (folder / FACTS).write_text(json.dumps(described, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return described


def _write_split(folder: Path, split: PairSplit) -> None:
    names = sorted({pair.concept for pair in split.pairs}) if split.templates else []
    classes = {name: number for number, name in enumerate(names)}
    write_shards(folder, _samples(split.pairs, classes), _SHARD_SAMPLES)
    if split.templates:
        for name, lines in (
            ("classnames.txt", names),
            ("zeroshot_classification_templates.txt", split.templates),
        ):
            (folder / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _samples(
    pairs: Sequence[Pair], classes: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, pair in enumerate(pairs):
        members = {"png": pair.png, "txt": pair.caption.encode()}
        if classes:
            members["cls"] = str(classes[pair.concept]).encode()
        record = {"concept": pair.concept, **pair.record}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        yield f"{number:08d}", members


def digest(folder: Path) -> str:
    """SHA-256 over all shards and text files of a folder, to compare builds."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".tar", ".txt"}):
        total.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
