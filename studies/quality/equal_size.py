"""Parts of the glyphs and the icons of one size: as many classes, as many pictures of each.

The data sets of the study differ in size, in classes and in pictures per class. These parts do not:
1,650 classes of training, drawn by seed, with seven pictures each (about as the emoji have). The
splits keep the classes that training shows; those of unseen classes stay whole. Prompts are names.

    python -m studies.quality.equal_size GLYPHS --of glyphs --out DIR

`--wrong 0.2` gives a fifth of the training pictures the name of another class.
"""

import argparse
import hashlib
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError
from studies.quality.datasets import DATA_SETS, EQUAL_SIZE, DataFolder

CLASSES, PICTURES = 1650, 7
SEED = 0
PER_SHARD = 1000
Sample = dict[str, bytes]
"""The members of a sample by extension."""


def main(words: list[str] | None = None) -> int:
    """Writes such a part of a data set.

    Args:
        words: the command line; none: that of the process.
    """
    parser = argparse.ArgumentParser(prog="equal_size", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the whole data set")
    parser.add_argument("--of", choices=EQUAL_SIZE, required=True, help="which data set it is")
    parser.add_argument("--out", type=Path, required=True, help="must not exist")
    parser.add_argument(
        "--wrong", type=float, default=0.0, help="share of wrong names (default: 0)"
    )
    args = parser.parse_args(words)
    try:
        write_part(DataFolder.open(DATA_SETS[args.of], args.folder), args.out, wrong=args.wrong)
    except UserError as error:
        print(f"equal_size: {error}", file=sys.stderr)
        return 2
    return 0


def write_part(whole: DataFolder, out: Path, classes: int = CLASSES, wrong: float = 0.0) -> None:
    """Writes the part of a data set.

    Args:
        whole: the data set.
        out: folder of the part.
        classes: how many.
        wrong: share of the training pictures that get the name of another class.

    Raises:
        UserError: the folder exists, the share is none, or training has fewer classes of so many
            pictures.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: choose another folder")
    if not 0 <= wrong < 1:
        raise UserError(f"--wrong {wrong:g} must be a share below 1")
    key = whole.data.concept_key
    by_class: dict[str, list[Sample]] = {}
    for sample in samples(whole.path / "train"):
        by_class.setdefault(json.loads(sample["json"])[key], []).append(sample)
    able = sorted(name for name, found in by_class.items() if len(found) >= PICTURES)
    if len(able) < classes:
        raise UserError(
            f"{whole.path}: {len(able)} classes have {PICTURES} pictures or more, and {classes} "
            "are needed"
        )
    draw = random.Random(SEED)
    chosen = sorted(draw.sample(able, classes))
    training = [each for name in chosen for each in draw.sample(by_class[name], PICTURES)]
    draw.shuffle(training)
    for place in draw.sample(range(len(training)), round(wrong * len(training))):
        training[place] = _renamed(training[place], key, chosen, draw)
    out.mkdir(parents=True)
    written = {"train": _write(out / "train", training)}
    first, second = whole.data.splits
    for part in ("development", "test"):
        written[f"{first}_{part}"] = _split(whole, f"{first}_{part}", out, set(chosen))
        written[f"{second}_{part}"] = _split(whole, f"{second}_{part}", out, None)
    facts = {"splits": {split: {"pairs": count} for split, (count, _) in written.items()}}
    facts["sha256"] = {split: digest for split, (_, digest) in written.items()}
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (out / whole.data.description).write_text(text, encoding="utf-8")


def samples(folder: Path) -> Iterator[Sample]:
    """The samples of the shards of a folder, in order."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            key, sample = None, Sample()
            for member in tar:
                stem, _, extension = member.name.rpartition(".")
                if stem != key and sample:
                    yield sample
                    sample = Sample()
                content = tar.extractfile(member)
                assert content is not None
                key, sample[extension] = stem, content.read()
            if sample:
                yield sample


def _renamed(sample: Sample, key: str, names: list[str], draw: random.Random) -> Sample:
    """The sample under the name of another class; its other captions stay."""
    facts = json.loads(sample["json"])
    other = draw.choice([name for name in names if name != facts[key]])
    return {**sample, "json": json.dumps({**facts, key: other}).encode()}


def _split(whole: DataFolder, name: str, out: Path, kept: set[str] | None) -> tuple[int, str]:
    """Writes a split, with the classes that are kept; none: with all."""
    source = whole.path / name
    names = (source / "classnames.txt").read_text(encoding="utf-8").splitlines()
    classes = [each for each in names if kept is None or each in kept]
    number = {each: place for place, each in enumerate(classes)}
    found = []
    for sample in samples(source):
        label = names[int(sample["cls"])]
        if label in number:
            found.append({**sample, "cls": str(number[label]).encode()})
    written = _write(out / name, found)
    (out / name / "classnames.txt").write_text("".join(f"{c}\n" for c in classes), encoding="utf-8")
    (out / name / "zeroshot_classification_templates.txt").write_text("{c}\n", encoding="utf-8")
    return written


def _write(folder: Path, found: list[Sample]) -> tuple[int, str]:
    """Writes shards; returns how many samples they have, and a digest of their bytes."""
    sizes = write_shards(folder, ((f"{n:08d}", each) for n, each in enumerate(found)), PER_SHARD)
    digest = hashlib.sha256()
    for shard in sizes:
        digest.update((folder / shard).read_bytes())
    return len(found), digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
