"""DataComp's evaluation sets on disk, in its published layout.

```
<data folder>/<folder of the task>/
  classnames.txt                           one a line            (classification)
  zeroshot_classification_templates.txt    with {c}              (classification)
  dataset_type.txt                         `retrieval`, or `association`; else absent
  instances.jsonl                          (association) {"cue", "candidates", "associations"}
  test/nshards.txt
  test/0.tar ... test/<n-1>.tar            <key>.{webp,png,jpg,jpeg} with
                                           <key>.cls             (classification)
                                           <key>.npy             metadata (WILDS, fairness)
                                           <key>.txt             captions, one a line (retrieval)
```

The association layout (WinoGAViL) is neuclip's own: each image once, under a key, and the
candidates and associations of an instance as lists of keys.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from neuclip.data.captions import CaptionRule
from neuclip.data.sources.shards import build_index
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, all_of
from neuclip.evaluation.class_names import (
    CLASSNAMES,
    DATASET_TYPE,
    TEMPLATES,
    classes_digest,
    read_classes,
)
from neuclip.evaluation.datacomp.suite import Task, load_suite
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.parallel.work_sharing import from_main
from neuclip.untrusted import read_file, whole_number

INSTANCES = "instances.jsonl"
SHARD_COUNT = "test/nshards.txt"
_SHARD_DIGITS = 6
_LARGEST_TEXT = 2**26  # bytes of a file of class names, templates or instances


@dataclass(frozen=True)
class Instance:
    """A cue, the keys of the images to choose from, and the keys of the right ones."""

    cue: str
    candidates: tuple[str, ...]
    associations: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """An open evaluation set.

    Attributes:
        task: the task.
        index: the samples.
        classnames: names of the classes (classification).
        templates: prompts with `{c}` (classification).
        instances: the cues (association).
        fingerprint: digest of the set's texts, and of name, size and time of its shards.
        positions: the samples to evaluate; if none, all.
        partial_of: number of samples (instances for association) of the full set, if only a part
            is evaluated.
        training: the training part of the set, for probes; none if there is none, or if it was not
            asked for.
    """

    task: Task
    index: Source
    classnames: list[str]
    templates: list[str]
    instances: list[Instance]
    fingerprint: str
    positions: NDArray[np.int64] | None = None
    partial_of: int | None = None
    training: EvaluationSplit | None = None

    @property
    def key(self) -> str:
        """Key in the results: the task's, with the size of a part (`mnist@300`)."""
        if self.partial_of is None or self.positions is None:
            return self.task.key
        return f"{self.task.key}@{len(self.instances) or len(self.positions)}"

    @property
    def title(self) -> str:
        """Name to display."""
        return self.task.name

    @property
    def classes_digest(self) -> int:
        """64-bit digest of class names, templates and instances; 0 without any."""
        cues = [f"{each.cue} {each.candidates} {each.associations}" for each in self.instances]
        return classes_digest(self.classnames or cues, self.templates)

    def part(self, samples: int) -> "TaskSet":
        """An evenly spread part of the set, for a quick estimate.

        Args:
            samples: largest number of samples (or instances).
        """
        total = len(self.instances) or len(self.index)
        if total <= samples:
            return self
        chosen = np.arange(samples, dtype=np.int64) * total // samples
        if not self.instances:
            return replace(self, positions=chosen, partial_of=total)
        instances = [self.instances[number] for number in chosen]
        needed = {key for instance in instances for key in instance.candidates}
        keys = (self.index.locate(position)[1] for position in range(len(self.index)))
        positions = [position for position, key in enumerate(keys) if key in needed]
        return replace(self, instances=instances, positions=np.array(positions), partial_of=total)


_INSTANCE = TypeAdapter(Instance)


def exists(data_dir: Path, task: Task) -> bool:
    """Whether the set's folder exists."""
    return (data_dir / task.folder).is_dir()


def open_tasks(data_dir: Path, tasks: Sequence[Task], *, training: bool = False) -> list[TaskSet]:
    """Opens the sets of several tasks, so that missing sets are reported before any evaluation.

    The main process lists the shards for all ranks.

    Args:
        data_dir: folder of all sets.
        tasks: the tasks.
        training: also open the training parts of classification sets that have one.

    Raises:
        UserError: sets are missing or incomplete; names all of them.
    """
    return from_main(lambda: _open_all(data_dir, tasks, training))


def _open_all(data_dir: Path, tasks: Sequence[Task], training: bool) -> list[TaskSet]:
    missing = [task for task in tasks if not exists(data_dir, task)]

    def check() -> None:
        if missing:
            raise UserError(_missing(data_dir, missing))

    present = [
        partial(open_task, data_dir, task, training=training)
        for task in tasks
        if task not in missing
    ]
    return [task_set for task_set in all_of([check, *present]) if task_set is not None]


def _missing(data_dir: Path, tasks: Sequence[Task]) -> str:
    """The message for sets that do not exist, with the command that downloads them."""
    where = f"in {data_dir}" if data_dir.is_dir() else f"at {data_dir}: no such folder"
    keys = ",".join(task.key for task in tasks)
    chosen = "" if len(tasks) == len(load_suite().tasks) else f" --tasks {keys}"
    named = f"the set of {keys}" if len(tasks) == 1 else f"{len(tasks)} evaluation sets"
    listed = "" if len(tasks) == 1 else f" ({', '.join(task.key for task in tasks)})"
    return (
        f"{named}{' is' if len(tasks) == 1 else ' are'} missing {where}{listed}; download with "
        f"'neuclip data download-evalsets {data_dir}{chosen}'"
    )


def open_task(data_dir: Path, task: Task, *, training: bool = False) -> TaskSet:
    """Opens a task's set.

    Args:
        data_dir: folder of all sets.
        task: the task.
        training: also open the training part, if it has one.

    Raises:
        UserError: the set or one of its files is missing, or contradicts the task.
    """
    folder = data_dir / task.folder
    if not folder.is_dir():
        raise UserError(_missing(data_dir, [task]))
    _check_type(folder, task)
    classnames: list[str] = []
    templates: list[str] = []
    instances: list[Instance] = []
    if task.kind == "classification":
        classnames, templates = read_classes(folder, default=False)
        if not classnames:
            raise UserError(f"{task.key}: {folder} has no {CLASSNAMES} and no {TEMPLATES}")
    elif task.kind == "association":
        instances = read_instances(folder / INSTANCES)
    shards = _shards(folder, "test")
    return TaskSet(
        task=task,
        index=build_index(shards, captions=CaptionRule(lines=True, required=False)),
        classnames=classnames,
        templates=templates,
        instances=instances,
        fingerprint=_fingerprint(folder, shards),
        training=_training_part(folder, task, classnames, templates) if training else None,
    )


def _training_part(
    folder: Path, task: Task, classnames: list[str], templates: list[str]
) -> EvaluationSplit | None:
    """The shards in `train/` beside those in `test/`, as in clip-benchmark's sets."""
    if not classnames or not (folder / "train").is_dir():
        return None
    shards = _shards(folder, "train")
    index = build_index(shards, captions=CaptionRule(lines=True, required=False))
    return EvaluationSplit(f"{task.key}/train", index, classnames, templates, published=True)


def read_instances(path: Path) -> list[Instance]:
    """Reads the instances of an association set.

    Raises:
        UserError: the file is missing, or a line is invalid.
    """
    found: list[Instance] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            instance = _INSTANCE.validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{path}, line {number}: invalid instance: {reason}") from None
        if not instance.associations or not set(instance.associations) <= set(instance.candidates):
            raise UserError(
                f"{path}, line {number}: the associations must be one or more of the candidates"
            )
        if not instance.cue.strip():
            raise UserError(f"{path}, line {number}: the cue is empty")
        found.append(instance)
    if not found:
        raise UserError(f"{path} contains no instances")
    return found


def _check_type(folder: Path, task: Task) -> None:
    path = folder / DATASET_TYPE
    found = _text(path).strip() if path.exists() else "classification"
    if found != task.kind:
        raise UserError(
            f"{task.key} is evaluated by {task.kind}, but {folder} is a set for {found} "
            f"({DATASET_TYPE})"
        )


def _shards(folder: Path, part: str) -> list[Path]:
    path = folder / part / "nshards.txt"
    text = _text(path).strip()
    count = whole_number(text, _SHARD_DIGITS)
    if not count:
        raise UserError(f"{path}: expected the number of shards, found {text[:40]!r}")
    shards = [folder / part / f"{number}.tar" for number in range(count)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder / part}: {len(missing)} of {len(shards)} shards are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return shards


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    digest = hashlib.sha256()
    for name in (CLASSNAMES, TEMPLATES, DATASET_TYPE, INSTANCES):
        path = folder / name
        content = read_file(path, _LARGEST_TEXT) if path.exists() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for shard in shards:
        # Hashing terabytes would take longer than evaluating them; a changed file has a new time.
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _text(path: Path) -> str:
    try:
        return read_file(path, _LARGEST_TEXT).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the evaluation set is not complete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
