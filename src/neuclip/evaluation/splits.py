"""Evaluation splits: any data that training reads, and class names and templates if they have some.

`--val-data` takes what `--train-data` takes, and besides:

- a set of clip-benchmark or DataComp as it lies on disk (`published`): `classnames.txt` and
  `zeroshot_classification_templates.txt`, or `dataset_type.txt` with `retrieval` and captions one a
  line; shards in the folder or in `test/` below it;
- a folder of images with one folder per class, as torchvision's ImageFolder reads it;
- any data with labels, under the key that `--label-key` names: the labels are the class names.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import MissingKeyError
from neuclip.data.captions import CaptionRule
from neuclip.data.opening import open_source
from neuclip.data.progress import Progress
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, all_of
from neuclip.evaluation.class_names import (
    CLASSNAMES,
    DATASET_TYPE,
    classes_digest,
    dataset_type,
    prompts_of,
    read_classes,
)
from neuclip.evaluation.label_classes import label_classes
from neuclip.evaluation.split_layouts import (
    EVALUATION,
    Purpose,
    class_folders,
    data_folder,
    side_folder,
)
from neuclip.masking import mask

_GENERIC = {
    "test", "testing", "validation", "val", "valid", "train", "training", "dev", "eval", "data",
    "images", "shards", "tars",
}  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSplit:
    """An open split; without class names, only retrieval is evaluated.

    The training data of a probe have the same form.

    Attributes:
        name: key in the results.
        index: the samples.
        classnames: names of the classes, or nothing.
        templates: prompts with `{c}`; nothing without classes, and for class names that only probes
            can use.
        published: laid out as clip-benchmark's and DataComp's sets are, so that it is evaluated by
            their rules.
        origin: where the samples come from, in a line for the log, if that is not `--val-data`.
        allow_damage: leave out corrupt samples and count them, whatever the settings say.
        by_label: the classes are labels; a sample without one counts for retrieval alone.
        training: the training part of the same data, for probes; none if there is none, or if it
            was not asked for.
    """

    name: str
    index: Source
    classnames: list[str]
    templates: list[str]
    published: bool = False
    origin: str = ""
    allow_damage: bool = False
    by_label: bool = False
    training: "EvaluationSplit | None" = None

    @property
    def key(self) -> str:
        """Key in the results."""
        return self.name

    @property
    def title(self) -> str:
        """Name to display."""
        return self.name

    @property
    def classes_digest(self) -> int:
        """64-bit digest of class names and templates; 0 without classes."""
        return classes_digest(self.classnames, self.templates)


def open_splits(
    pattern: str | None,
    reading: ReadingConfig | None = None,
    progress: Progress | None = None,
    purpose: Purpose = EVALUATION,
) -> list[EvaluationSplit]:
    """Opens the splits of `--val-data`, joined by '::'.

    Args:
        pattern: the splits, each as for `--train-data`; none or empty: no split.
        reading: how tables, captions and remote shards are read, as in training.
        progress: called while shards are indexed.
        purpose: what they are opened for.

    Raises:
        UserError: splits cannot be opened; names all of them.
    """
    parts = [part for part in (pattern or "").split("::") if part]
    return all_of(
        partial(open_split, part, name, reading, progress, purpose)
        for part, name in zip(parts, split_names(parts), strict=True)
    )


def with_templates(
    splits: Sequence[EvaluationSplit], templates: str | None
) -> list[EvaluationSplit]:
    """The splits with the prompts of `--val-templates` in place of their own.

    Args:
        splits: the splits.
        templates: a text file with a prompt a line, or prompts joined by '::'; none: as they are.

    Raises:
        UserError: a prompt has no place for the class name, the file cannot be read, or no split
            has classes.
    """
    if templates is None:
        return list(splits)
    if not any(split.templates for split in splits):
        raise UserError(
            f"--val-templates {templates}: no evaluated data have class names; templates are for "
            "zero-shot classification (of a table with labels: --label-key COLUMN)"
        )
    prompts = prompts_of(templates)
    return [replace(split, templates=prompts) if split.templates else split for split in splits]


def require_label_classes(splits: Sequence[EvaluationSplit], reading: ReadingConfig) -> None:
    """Checks that labels which only evaluation reads give a split its classes.

    Args:
        splits: all splits of a run.
        reading: how they were opened.

    Raises:
        UserError: no split has classes by its labels.
    """
    if reading.label_key is None or reading.labels_join or any(each.by_label for each in splits):
        return
    raise UserError(
        f"--label-key {reading.label_key} has no effect: no evaluated data have class names under "
        "it (the lines above say why); leave it out, or name another column"
    )


def split_names(parts: Sequence[str]) -> list[str]:
    """A name for each split: the end of its path, with as many folders as tell it from the others.

    A folder called `val`, `test` or the like is named with the folder above it (`coco/val`).
    """
    paths = [_components(part) for part in parts]
    length = [2 if path[-1].lower() in _GENERIC else 1 for path in paths]
    while True:
        names = ["/".join(path[-n:]) for path, n in zip(paths, length, strict=True)]
        same = [names.count(name) > 1 for name in names]
        longer = [
            n + 1 if again and n < len(path) else n
            for path, n, again in zip(paths, length, same, strict=True)
        ]
        if longer == length:
            break
        length = longer
    return [f"{name}#{names[:i].count(name) + 1}" if names[:i].count(name) else name
            for i, name in enumerate(names)]  # fmt: skip


def _components(part: str) -> list[str]:
    """The path of a split, without secrets; files that a pattern names stand for their folder."""
    if "://" in part or part.startswith("pipe:"):
        part = mask(part)
        path = (part.partition("://")[2] or part.removeprefix("pipe:")).partition("?")[0]
    else:
        path = str(Path(part).expanduser().absolute())
    found = [piece for piece in path.split("/") if piece and piece != "."]
    files = len(found) > 1 and (found[-1].lower().endswith(".tar") or "{" in found[-1])
    return (found[:-1] if files else found) or [part]


def open_split(
    part: str | Path,
    name: str | None = None,
    reading: ReadingConfig | None = None,
    progress: Progress | None = None,
    purpose: Purpose = EVALUATION,
) -> EvaluationSplit:
    """Opens one split.

    Args:
        part: as for `--train-data`, or one of the layouts above.
        name: key in the results; if none, from the path.
        reading: how tables, captions and remote shards are read.
        progress: called while shards are indexed.
        purpose: what it is opened for.

    Raises:
        UserError: the data are missing or empty, have neither captions nor classes, or their class
            names are invalid.
    """
    part = str(part)
    name = name or split_names([part])[0]
    folder = Path(part).expanduser()
    if not folder.is_dir():
        source, label_key = _open(part, reading, progress, purpose)
        named = _by_labels(name, source, label_key, folder.parent, progress, purpose)
        return named or EvaluationSplit(name, _with_captions(part, source, purpose), [], [])
    side, data = side_folder(folder, purpose), data_folder(folder, purpose)
    kind = dataset_type(side)
    if kind not in {None, "classification", "retrieval"}:
        raise UserError(
            f"{side / DATASET_TYPE}: {kind} is not supported, only classification and retrieval"
        )
    classnames, templates = ([], []) if kind == "retrieval" else read_classes(side)
    published = (data != folder or side != folder or kind is not None) and any(data.glob("*.tar"))
    if classnames and not published and any(data.glob("*.tar")):
        index = _labelled_shards(data, reading or ReadingConfig(), progress)
        return EvaluationSplit(name, index, classnames, templates)
    if published:
        rule = CaptionRule(lines=True, required=not classnames)
        index = build_index(expand_patterns(str(data)), captions=rule, progress=progress)
        source = index if classnames else _with_captions(part, index, purpose)
        split = EvaluationSplit(name, source, classnames, templates, published=True)
        return replace(split, training=_training_part(split, side, data, progress, purpose))
    source, label_key = _open(str(data), reading, progress, purpose)
    named = _by_labels(name, source, label_key, side, progress, purpose)
    if named is not None:
        return named
    if source.has_captions and not classnames and purpose.prompts != "unused":
        return EvaluationSplit(name, source, [], [])
    found = class_folders(data, classnames, templates, purpose)
    if found is not None:
        return EvaluationSplit(name, *found)
    source = source if classnames else _with_captions(part, source, purpose)
    return EvaluationSplit(name, source, classnames, templates)


def _labelled_shards(data: Path, reading: ReadingConfig, progress: Progress | None) -> Source:
    """Shards with class names beside them. Captions are optional.

    They come from the keys of `--caption-key` or `--caption-keys`, or from the `.txt` files if the
    first samples have none there: the flags of a run are for its training data first.
    """
    opened = partial(build_index, expand_patterns(str(data)), progress=progress)
    rule = CaptionRule.of(reading, required=False)
    index = opened(captions=rule)
    if not rule.json_keys or any(index.first_captions()):
        return index
    keys = " or ".join(map(repr, rule.json_keys))
    _log.info("%s: captions from the .txt files: no caption under %s in the .json", data, keys)
    return opened(captions=CaptionRule(required=False))


def _training_part(
    split: EvaluationSplit, side: Path, data: Path, progress: Progress | None, purpose: Purpose
) -> EvaluationSplit | None:
    """The shards in `train/` beside those in `test/`, in a set of clip-benchmark."""
    folder = side / "train"
    if not (purpose.training and split.classnames and data != folder and any(folder.glob("*.tar"))):
        return None
    rule = CaptionRule(lines=True, required=False)
    index = build_index(expand_patterns(str(folder)), captions=rule, progress=progress)
    return replace(split, name=f"{split.name}/train", index=index)


def _open(
    part: str, reading: ReadingConfig | None, progress: Progress | None, purpose: Purpose
) -> tuple[Source, str | None]:
    """Opens data as in training, without the settings that decide order and ids of samples.

    Returns:
        The source, and the label key if the data have it.
    """
    neutral = {"train_data_upsampling_factors": None, "data_size": None, "data_format": "auto"}
    neutral |= {"hard_negative_key": None, "pair_weight_key": None}
    reading = (reading or ReadingConfig()).model_copy(update=neutral)
    try:
        source = open_source(
            part, reading, progress, captions=purpose.captions, splits=purpose.splits
        )
    except MissingKeyError as error:
        _log.info("read without labels: %s", error)
        return _open(part, reading.model_copy(update={"label_key": None}), progress, purpose)
    if not source.has_captions and reading.caption_key is not None:
        reading = reading.model_copy(update={"caption_key": None})
        source = open_source(
            part, reading, progress, captions=purpose.captions, splits=purpose.splits
        )
    return source, reading.label_key


def _by_labels(
    name: str,
    source: Source,
    label_key: str | None,
    folder: Path,
    progress: Progress | None,
    purpose: Purpose,
) -> EvaluationSplit | None:
    """The split with its labels as classes; none if it has no labels that name classes."""
    if label_key is None:
        return None
    found = label_classes(source, label_key, folder, progress, purpose.prompts)
    if found is None:
        return None
    return EvaluationSplit(name, found.source, found.classnames, found.templates, by_label=True)


def _with_captions(part: str, source: Source, purpose: Purpose) -> Source:
    """The source, which is evaluated by its captions alone."""
    if purpose.prompts == "unused":
        raise UserError(
            f"{part} has no labels to train probes on: name their column or key with --label-key "
            f"(cls: the .cls files of shards), or give shards with {CLASSNAMES} beside them, or a "
            "folder per class"
        )
    if not source.has_captions:
        raise UserError(
            f"evaluation split {part} has neither captions nor class names: retrieval needs "
            "captions (of a table: --csv-caption-key COLUMN); zero-shot classification needs "
            f"{CLASSNAMES} beside the shards (class indices in .cls), a folder per class, or names "
            "under --label-key"
        )
    return source
