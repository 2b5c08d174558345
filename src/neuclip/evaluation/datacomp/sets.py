"""The benchmark's sets on disk, in the layout in which DataComp publishes them.

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

The association layout (WinoGAViL) is our own: every picture once, under a key, and each instance's
candidates and associations as lists of keys.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from neuclip.data.sources.shards import build_index
from neuclip.data.sources.source import Source
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.suite import Task
from neuclip.evaluation.splits import CLASSNAMES, TEMPLATES, read_classes

DATASET_TYPE = "dataset_type.txt"
INSTANCES = "instances.jsonl"
SHARD_COUNT = "test/nshards.txt"


@dataclass(frozen=True)
class Instance:
    """A cue, pictures to choose from, and those that belong to the cue; pictures by key."""

    cue: str
    candidates: tuple[str, ...]
    associations: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """A set ready to be judged.

    Attributes:
        task: The task.
        index: Its samples.
        classnames: Name of every class (classification).
        templates: Prompts with `{c}` (classification).
        instances: What to solve (association).
        fingerprint: Changes with the set's texts, and with name, size or time of a shard.
        positions: Which samples are judged; none: all.
        partial_of: Number of samples (of an association set: instances) of the set, if only a part
            of them is judged.
    """

    task: Task
    index: Source
    classnames: list[str]
    templates: list[str]
    instances: list[Instance]
    fingerprint: str
    positions: NDArray[np.int64] | None = None
    partial_of: int | None = None

    @property
    def key(self) -> str:
        """The key of its results: that of the task, and of a part also its size (`mnist@300`)."""
        if self.partial_of is None or self.positions is None:
            return self.task.key
        return f"{self.task.key}@{len(self.instances) or len(self.positions)}"

    def part(self, samples: int) -> "TaskSet":
        """At most so many samples (or instances), evenly spread: a quick look, not the benchmark.

        Args:
            samples: How many.
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


def is_there(data_dir: Path, task: Task) -> bool:
    """Whether the set's folder exists."""
    return (data_dir / task.folder).is_dir()


def open_task(data_dir: Path, task: Task) -> TaskSet:
    """Opens a task's set.

    Args:
        data_dir: The folder of all sets.
        task: Which one.

    Raises:
        UserError: the set or one of its files is not there, or contradicts the task.
    """
    folder = data_dir / task.folder
    if not folder.is_dir():
        raise UserError(
            f"{task.key}: no evaluation set at {folder}; fetch it with "
            f"'neuclip data download-evalsets {data_dir} --tasks {task.key}'"
        )
    _check_type(folder, task)
    classnames: list[str] = []
    templates: list[str] = []
    instances: list[Instance] = []
    if task.kind == "classification":
        classnames, templates = read_classes(folder)
        if not classnames:
            raise UserError(f"{task.key}: {folder} has no {CLASSNAMES} and no {TEMPLATES}")
    elif task.kind == "association":
        instances = read_instances(folder / INSTANCES)
    shards = _shards(folder)
    return TaskSet(
        task=task,
        index=build_index(shards, captions_required=False),
        classnames=classnames,
        templates=templates,
        instances=instances,
        fingerprint=_fingerprint(folder, shards),
    )


def read_instances(path: Path) -> list[Instance]:
    """Instances of an association set.

    Raises:
        UserError: no such file, or a line is no instance.
    """
    found: list[Instance] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            instance = _INSTANCE.validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{path}, line {number} is no instance: {reason}") from None
        if not instance.associations or not set(instance.associations) <= set(instance.candidates):
            raise UserError(
                f"{path}, line {number}: the associations must be some of the candidates"
            )
        if not instance.cue.strip():
            raise UserError(f"{path}, line {number}: the cue is empty")
        found.append(instance)
    if not found:
        raise UserError(f"{path} holds no instance")
    return found


def _check_type(folder: Path, task: Task) -> None:
    path = folder / DATASET_TYPE
    found = _text(path).strip() if path.exists() else "classification"
    if found != task.kind:
        raise UserError(
            f"{task.key} is judged by {task.kind}, but {folder} is a set for {found!r} "
            f"({DATASET_TYPE})"
        )


def _shards(folder: Path) -> list[Path]:
    path = folder / SHARD_COUNT
    text = _text(path).strip()
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"{path}: expected the number of shards, found {text[:40]!r}")
    shards = [folder / "test" / f"{number}.tar" for number in range(int(text))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder / 'test'}: {len(missing)} of {len(shards)} shards are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return shards


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    digest = hashlib.sha256()
    for name in (CLASSNAMES, TEMPLATES, DATASET_TYPE, INSTANCES):
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for shard in shards:
        # Hashing terabytes would cost more than judging them; a changed file has another time.
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the evaluation set is not complete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
