"""The benchmark's sets from the hub to a data folder: what is there and whole stays as it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from neuclip.errors import UserError
from neuclip.evaluation.datacomp.convert import convert
from neuclip.evaluation.datacomp.hub import Hub, Progress, RemoteFile, home, matches
from neuclip.evaluation.datacomp.suite import Task
from neuclip.files import folder_when_complete, write_whole

_WANTED = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
    "test/nshards.txt",
    "test/*.tar",
)
_RECORD = ".neuclip/source.json"


@dataclass(frozen=True)
class Fetched:
    """What was done for a task: files in all, and those that were not there before."""

    task: Task
    files: int
    new: int


def download_task(
    hub: Hub, data_dir: Path, task: Task, progress: Progress | None = None
) -> Fetched:
    """Fetches a task's set, or what is missing or damaged of it.

    Raises:
        UserError: the hub does not answer or refuses, what it sends is damaged, or there is no
            right or room to write.
    """
    files = hub.files(task.source)
    folder = data_dir / task.folder
    if task.kind != "classification":
        return _download_and_convert(hub, folder, task, files, progress)
    wanted = [file for file in files if any(fnmatch(file.path, name) for name in _WANTED)]
    if not any(file.path.endswith(".tar") for file in wanted):
        raise UserError(f"{task.source} has no test/*.tar: not a set in DataComp's layout")
    return Fetched(task, len(wanted), _fetch_all(hub, folder, task.source, wanted, progress))


def _download_and_convert(
    hub: Hub, folder: Path, task: Task, files: Sequence[RemoteFile], progress: Progress | None
) -> Fetched:
    chosen: list[RemoteFile] = []
    for suffix in (".csv", ".zip"):
        found = [file for file in files if file.path.endswith(suffix)]
        if len(found) != 1:
            raise UserError(f"{task.source}: expected one *{suffix}, found {len(found)}")
        chosen += found
    origin = {file.path: file.digest for file in chosen}
    record = folder / _RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == origin:
        return Fetched(task, len(chosen), 0)
    cache = home() / "neuclip" / task.source.replace("/", "--")
    new = _fetch_all(hub, cache, task.source, chosen, progress)
    table, archive = (cache / file.path for file in chosen)
    with folder_when_complete(folder) as out:
        convert(task.kind, table, archive, out)
        (out / _RECORD).parent.mkdir()
        (out / _RECORD).write_text(json.dumps(origin), encoding="utf-8")
    return Fetched(task, len(chosen), new)


def _fetch_all(
    hub: Hub,
    folder: Path,
    repository: str,
    files: Sequence[RemoteFile],
    progress: Progress | None,
) -> int:
    """Fetches what is not there; returns how many files that was.

    What was verified is noted with size and time, so that the next call need not hash it again.
    """
    record = folder / _RECORD
    noted: dict[str, list[object]] = {}
    if record.is_file():
        noted = json.loads(record.read_text(encoding="utf-8"))
    new = 0
    for file in files:
        target = folder / file.path
        if ".." in Path(file.path).parts or Path(file.path).is_absolute():
            raise UserError(f"{repository}: the path {file.path!r} leads out of the folder")
        if not target.is_file() or noted.get(file.path) != _state(target, file):
            if not matches(target, file):
                hub.fetch(repository, file, target, progress)
                new += 1
            noted[file.path] = _state(target, file)
            write_whole(record, json.dumps(noted, indent=1) + "\n")
    return new


def _state(target: Path, file: RemoteFile) -> list[object]:
    status = target.stat()
    return [file.digest, status.st_size, status.st_mtime_ns]
