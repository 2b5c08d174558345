"""Downloads DataComp's evaluation sets from the Hugging Face hub into a data folder.

`huggingface_hub` does the transfers: it resumes interrupted ones, keeps complete files, and reads
`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`. Checked here: sizes and SHA-256 sums.
Imports no torch.
"""

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from neuclip.data.progress import Progress
from neuclip.data.remote import hub
from neuclip.errors import UserError, printable
from neuclip.evaluation.datacomp.convert import convert
from neuclip.evaluation.datacomp.suite import Task
from neuclip.files import folder_when_complete, sha256
from neuclip.untrusted import read_json

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, RepoSibling

_WANTED = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
    "test/nshards.txt",
    "test/*.tar",
)
_FILES = 100_000
"""Largest number of files in a repository; DataComp's sets have at most some hundreds."""
_LARGEST_LISTING = 2**26
"""Bytes of a list of files, after decompression; a hundred thousand files take 40 MB."""
_LISTING_SECONDS, _LISTING_WAIT = 120.0, 30.0  # for the whole list, and for its next byte
_SOURCE_RECORD = ".neuclip/source.json"


@dataclass(frozen=True)
class Downloaded:
    """The outcome for one task.

    Attributes:
        task: the task.
        files: number of files of its set.
        new: number of files that were downloaded now.
    """

    task: Task
    files: int
    new: int


def download_task(data_dir: Path, task: Task, report: Progress | None = None) -> Downloaded:
    """Downloads a task's set, or its missing and corrupt files.

    Args:
        data_dir: folder of all sets.
        task: the task.
        report: receives the name of each file, the bytes received, and its size.

    Raises:
        UserError: the hub does not answer, denies access or sends corrupt data, or the folder
            cannot be written to.
    """
    from huggingface_hub import constants

    folder = data_dir / task.folder
    page = f"{constants.ENDPOINT}/datasets/{task.source}"
    with hub.errors_as_messages(task.source, page, folder=folder):
        repository = _Repository(task.source)
        if task.kind == "classification":
            return _download_in_place(repository, folder, task, report)
        return _download_and_convert(repository, folder, task, report)


def _download_in_place(
    repository: "_Repository", folder: Path, task: Task, report: Progress | None
) -> Downloaded:
    files = [f for f in repository.files if any(fnmatch(f.rfilename, name) for name in _WANTED)]
    if not any(file.rfilename.endswith(".tar") for file in files):
        raise UserError(
            f"{task.source} has no test/*.tar, so it is not in DataComp's layout "
            f"(files: {', '.join(file.rfilename for file in repository.files[:5])})"
        )
    new = sum(repository.download(file, folder, report)[1] for file in files)
    return Downloaded(task, len(files), new)


def _download_and_convert(
    repository: "_Repository", folder: Path, task: Task, report: Progress | None
) -> Downloaded:
    """The sources go to the hub's own cache, and the converted set to `folder`."""
    sources: list[RepoSibling] = []
    for suffix in (".csv", ".zip"):
        found = [file for file in repository.files if file.rfilename.endswith(suffix)]
        if len(found) != 1:
            raise UserError(f"{task.source}: expected one *{suffix}, found {len(found)}")
        sources += found
    origin = {file.rfilename: _digest(file) for file in sources}
    record = folder / _SOURCE_RECORD
    if _recorded(record) == origin:
        return Downloaded(task, len(sources), 0)
    (table, new_table), (archive, new_archive) = (
        repository.download(file, None, report) for file in sources
    )
    with folder_when_complete(folder) as out:
        convert(task.kind, table, archive, out)
        (out / _SOURCE_RECORD).parent.mkdir()
        (out / _SOURCE_RECORD).write_text(json.dumps(origin), encoding="utf-8")
    return Downloaded(task, len(sources), new_table + new_archive)


def _recorded(record: Path) -> object:
    """The sources that a converted set was made of; None if they are not recorded."""
    try:
        return read_json(record)
    except (OSError, ValueError):
        return None


class _Repository:
    """The current commit of a dataset repository.

    The hub's library sends the access token to the hub alone, and asks for the list of files once.

    Attributes:
        files: all files, with sizes and checksums.
    """

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi

        self._name = name
        try:
            with _bounded_answers():
                self._info: DatasetInfo = HfApi().dataset_info(
                    name, files_metadata=True, timeout=_LISTING_WAIT
                )
            if not isinstance(cast(object, self._info.sha), str):
                raise TypeError(f"the commit {self._info.sha!r}")
            self.files = _checked(self._info.siblings or [])
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            why = printable(f"{type(error).__name__}: {error}")
            raise UserError(f"{name}: the hub's answer is not a list of files ({why})") from None

    def download(
        self, file: "RepoSibling", folder: Path | None, report: Progress | None
    ) -> tuple[Path, bool]:
        """Downloads a file unless it is complete on disk.

        Args:
            file: the file.
            folder: target folder; if none, the hub's cache.
            report: progress callback.

        Returns:
            Path of the file, and whether it was downloaded.
        """
        from huggingface_hub import hf_hub_download

        where: dict[str, Any] = {
            "repo_type": "dataset", "revision": self._info.sha, "local_dir": folder,
        }  # fmt: skip
        target = folder / file.rfilename if folder is not None else None
        if target is not None and target.is_file() and target.stat().st_size != file.size:
            target.unlink()
        if target is None or target.is_file():
            state = hf_hub_download(self._name, file.rfilename, dry_run=True, **where)
            if not state.will_download:
                return Path(state.local_path), False
        bar = None if report is None else hub.progress_bar(report, file.rfilename)
        path = Path(hf_hub_download(self._name, file.rfilename, tqdm_class=bar, **where))
        if path.stat().st_size != file.size or (file.lfs and sha256(path) != file.lfs.sha256):
            path.resolve().unlink()
            raise UserError(
                f"{self._name}: {file.rfilename} arrived corrupt (expected {_digest(file)}, "
                f"{file.size} bytes) and was removed: run the command again"
            )
        return path, True


@contextmanager
def _bounded_answers() -> Generator[None]:
    """Bounds the bytes and the time of the hub's answers within a block.

    Raises:
        UserError: (in the block) an answer exceeds a bound.
    """
    from huggingface_hub.utils import get_session

    client, end = get_session(), time.monotonic() + _LISTING_SECONDS

    def read(answer: Any) -> None:  # noqa: ANN401  a response of the HTTP client
        content = bytearray()
        for part in answer.iter_bytes():
            content += part
            if len(content) > _LARGEST_LISTING or time.monotonic() > end:
                raise UserError(
                    f"{answer.url}: the list of files is longer than {_LARGEST_LISTING:,} bytes or "
                    f"takes longer than {_LISTING_SECONDS:.0f} s"
                )
        answer._content = bytes(content)

    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks["response"], read]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def _checked(files: "list[RepoSibling]") -> "list[RepoSibling]":
    """The list of files, if it is one that a hub may send. Its library refuses paths with `..`.

    Raises:
        TypeError: too many files, or a file without a name or a size.
    """
    if len(files) > _FILES:
        raise TypeError(f"{len(files):,} files, more than {_FILES:,}")
    for file in files:
        name, size = cast(object, file.rfilename), cast(object, file.size)
        if not isinstance(name, str) or not name.isprintable():
            raise TypeError(f"the name {name!r}")
        if not isinstance(size, int) or size < 0:
            raise TypeError(f"{name} of the size {size!r}")
    return files


def _digest(file: "RepoSibling") -> str:
    """SHA-256 of a large file; git's object id, a SHA-1, of a small one."""
    return f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
