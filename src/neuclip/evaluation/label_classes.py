"""Classes of an evaluation split from the labels of its samples: `--label-key`.

The labels are the class names, as in a table with the columns `file,caption,label`. Labels that are
numbers name nothing for a prompt: they count the lines of a `classnames.txt` beside the data.
"""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from neuclip.data.order import Layout
from neuclip.data.progress import Progress
from neuclip.data.samples import Sample, SampleError
from neuclip.data.sources.source import ImageT, Source
from neuclip.errors import UserError, nearest, printable, quantity
from neuclip.evaluation.class_names import CLASSNAMES, DEFAULT_TEMPLATE, beside

_NUMBER = re.compile(r"\d+(\.0+)?")  # pandas writes 3.0 for the 3 of a column with gaps
_WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 4
Prompts = Literal["needed", "wanted", "unused"]
"""What labels that name nothing for a prompt, such as numbers, are.

- `needed`: no classes, and the reason is logged;
- `wanted`: classes without templates, and the reason is logged;
- `unused`: classes.
"""
_AHEAD = 2  # blocks announced ahead of reading
_log = logging.getLogger("neuclip")


class LabelledSource(Source):
    """A source whose samples have the class that their label names.

    Args:
        source: the source, opened with the label key.
        classes: class index by label.
    """

    def __init__(self, source: Source, classes: Mapping[str, int]) -> None:
        self._source, self._classes = source, dict(classes)
        self.layout: Layout = source.layout
        self.damage, self.shuffle_window = source.damage, source.shuffle_window
        self.opened, self.unused = source.opened, source.unused
        self.has_captions, self.selection = source.has_captions, source.selection

    def _content(self, position: int) -> Sample[bytes]:
        return self._with_class(self._source.content(position))

    def _texts(self, position: int) -> Sample[None]:
        return self._with_class(self._source.texts(position))

    def read_with(self, position: int, decode: Callable[[bytes], ImageT]) -> Sample[ImageT]:
        """Reads one sample from the source and decodes its image."""
        return self._with_class(self._source.read_with(position, decode))

    def _with_class(self, sample: Sample[ImageT]) -> Sample[ImageT]:
        return replace(sample, class_index=self._classes.get(sample.annotations.label))

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample is stored in the source, and its key."""
        return self._source.locate(position)

    def files(self) -> Iterable[str | Path]:
        """The files of the source."""
        return self._source.files()

    def file_of(self, position: int) -> str | Path:
        """The file of a sample in the source."""
        return self._source.file_of(position)

    def sample_id(self, position: int) -> int:
        """The id of a sample in the source."""
        return self._source.sample_id(position)

    def expect(self, blocks: Sequence[int]) -> None:
        """Announces to the source the blocks that will be read next."""
        self._source.expect(blocks)

    def close(self) -> None:
        """Closes the source."""
        self._source.close()


@dataclass(frozen=True)
class LabelClasses:
    """A source with classes.

    Attributes:
        source: the samples; one without a label has no class.
        classnames: names of the classes.
        templates: prompts with `{c}`.
    """

    source: LabelledSource
    classnames: list[str]
    templates: list[str]


def label_classes(
    source: Source,
    label_key: str,
    folder: Path | None,
    progress: Progress | None = None,
    prompts: Prompts = "needed",
) -> LabelClasses | None:
    """The classes that the labels of a source name; every sample's texts are read once.

    Args:
        source: the source, opened with the label key.
        label_key: for messages.
        folder: may hold `classnames.txt`, all classes in the order of their numbers, and templates.
        progress: called while labels are read.
        prompts: what labels are that name nothing for a prompt.

    Returns:
        The classes; none if the labels name none, for a reason that is logged.

    Raises:
        UserError: a label is not among the names in `classnames.txt`.
    """
    counts, unlabelled = _count(source, progress)
    names, templates = ([], []) if folder is None else beside(folder)
    templates = templates or [DEFAULT_TEMPLATE]
    if names and counts:
        classes = _classes_in(names, counts, f"--label-key {label_key}, {folder}/{CLASSNAMES}")
    else:
        reason = _why_not(counts)
        if reason is not None and prompts != "unused":
            _log.warning(
                "%s: no zero-shot accuracy by --label-key %s: %s",
                source.layout.spans[0].name, label_key, reason,
            )  # fmt: skip
        if not counts or (reason is not None and prompts == "needed"):
            return None
        names, classes = _classes_of(counts)
        templates = [] if reason is not None else templates
    shown = ", ".join(printable(name, 40) for name in names[:_SHOWN])
    _log.info(
        "%s: %s by --label-key %s: %s%s; %s", source.layout.spans[0].name,
        quantity(len(names), "class"), label_key,
        shown, ", ..." if len(names) > _SHOWN else "", _facts(counts, unlabelled),
    )  # fmt: skip
    return LabelClasses(LabelledSource(source, classes), names, templates)


def folder_of(source: Source) -> Path | None:
    """The folder of a source, or that of its first table or shard; none if it is remote."""
    name = source.layout.spans[0].name
    if "://" in name:
        return None
    return Path(name) if Path(name).is_dir() else Path(name).parent


def _facts(counts: Mapping[str, int], unlabelled: int) -> str:
    total = sum(counts.values())
    facts = [quantity(total, "sample")]
    if len(counts) == total:
        facts = ["every sample has a label of its own, so accuracy is retrieval of the label"]
    if unlabelled:
        facts.append(f"{quantity(unlabelled, 'sample')} without a label, in retrieval alone")
    return ", ".join(facts)


def _count(source: Source, progress: Progress | None) -> tuple[Counter[str], int]:
    """The number of samples of each label, and of those without one."""
    counts, block = Counter[str](), -1
    for position in range(len(source)):
        if progress is not None and position % 100 == 0:
            progress("reading labels", position, len(source))
        if (now := source.layout.block(position)) != block:
            block = now
            source.expect(range(block, min(block + _AHEAD, len(source.layout.ends))))
        with contextlib.suppress(SampleError):  # evaluation counts corrupt samples
            counts[source.texts(position).annotations.label] += 1
    unlabelled = counts.pop("", 0)
    return counts, unlabelled


def _name(label: str) -> str:
    """A label as it stands in a prompt."""
    return " ".join(label.replace("_", " ").split())


def _key(label: str) -> str:
    """What labels of one class have in common."""
    return _name(label).casefold()


def _number_or_key(label: str) -> str:
    """As `_key`; 3.0 is the number 3."""
    return str(int(float(label))) if _NUMBER.fullmatch(label) else _key(label)


def _why_not(counts: Mapping[str, int]) -> str | None:
    """Why labels cannot be class names; None if they can."""
    if not counts:
        return "no sample has a label"
    first = printable(min(counts, key=len), 40)
    if len({_key(label) for label in counts}) == 1:
        return f"every label is '{first}'"
    names = (
        f"name a column of names, or write the names, one a line, to {CLASSNAMES} beside the data"
    )
    if all(map(_NUMBER.fullmatch, counts)):
        return (
            f"the labels are numbers, such as {first}, and a prompt needs names: {names}: label 0 "
            "is the first line"
        )
    if all(map(_WORDNET_ID.fullmatch, counts)):
        return f"the labels are WordNet ids, such as {first}, and a prompt needs names: {names}"
    return None


def match_classes(given: Sequence[str], wanted: Sequence[str], where: str) -> list[int | None]:
    """Finds classes of other data among the wanted ones: by position in equal lists, else by name.

    Args:
        given: names of classes; numbers count the wanted ones from 0 if those are names.
        wanted: names of classes.
        where: names the given ones, for messages.

    Returns:
        The index of each given class among the wanted ones; None if it is not there.

    Raises:
        UserError: none is there, a number is beyond the wanted ones, or two of those have one name.
    """
    if list(given) == list(wanted):
        return list(range(len(wanted)))
    if all(map(_NUMBER.fullmatch, given)) and not any(map(_NUMBER.fullmatch, wanted)):
        classes = _classes_in(wanted, given, where)
        return [classes[label] for label in given]
    repeated = Counter(map(_number_or_key, wanted))
    twice = next((name for name in given if repeated[_number_or_key(name)] > 1), None)
    if twice is not None:
        raise UserError(
            f"{where}: two of the evaluated classes have the name {printable(twice, 60)!r}: give "
            f"both data the same {CLASSNAMES}"
        )
    known = {_number_or_key(name): index for index, name in enumerate(wanted)}
    found = [known.get(_number_or_key(name)) for name in given]
    if all(index is None for index in found):
        shown = [", ".join(printable(name, 40) for name in names[:3]) for names in (given, wanted)]
        raise UserError(
            f"{where}: none of its {quantity(len(given), 'class')} ({shown[0]}, ...) is among "
            f"those that are evaluated ({shown[1]}, ...)"
        )
    return found


def _classes_of(labels: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Names for labels, and the index of each label among them; numbers are ordered as such."""
    spelled: dict[str, str] = {}
    for label in sorted(labels):
        spelled.setdefault(_key(label), _name(label))
    numeric = all(map(_NUMBER.fullmatch, spelled))
    keys = sorted(spelled, key=float) if numeric else sorted(spelled)
    numbers = {key: number for number, key in enumerate(keys)}
    return [spelled[key] for key in keys], {label: numbers[_key(label)] for label in labels}


def _classes_in(names: Sequence[str], labels: Iterable[str], where: str) -> dict[str, int]:
    """The class index of each label among given names.

    Raises:
        UserError: a label is not among them.
    """
    known = {_key(name): index for index, name in enumerate(names)}
    if all(map(_NUMBER.fullmatch, labels)) and not any(map(_NUMBER.fullmatch, names)):
        classes = {label: int(float(label)) for label in labels}
        beyond = max(classes.values())
        if beyond >= len(names):
            raise UserError(
                f"{where}: label {beyond} has no name among {quantity(len(names), 'line')}; label "
                "0 is the first line"
            )
        return classes
    classes: dict[str, int] = {}
    for label in labels:
        index = known.get(_key(label))
        if index is None:
            raise UserError(
                f"{where}: label {printable(label, 60)!r} is not among the "
                f"{quantity(len(names), 'name')}: {nearest(label, list(names))}"
            )
        classes[label] = index
    return classes
