"""A folder in which the n-th change of a file fails, whichever library makes it.

`faulty_disk.c`, built with gcc, is loaded before all other libraries. It counts what a process and
its children change below a folder: files made, written, flushed, renamed or deleted; folders and
links made. One of these changes fails; what fails after it depends on the kind.
"""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
KINDS = {"full": (errno.ENOSPC, 1), "read-only": (errno.EROFS, 2), "broken": (errno.EIO, 0)}
"""The error of the n-th change, and what fails after it: see `write_faults.c`."""
CAUSES = ("no space left", "No space left", "Read-only file system", "Input/output error")
_PLAN = struct.Struct("5q")
_TIMES = re.compile(
    rb'"(?:samples_per_second|memory_mb|seconds|share_\w+)": [^,}]+'
    rb"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?"
)
"""What differs between two runs of the same command."""

Snapshot = dict[str, bytes]
"""Contents of files by their names in a folder, without times."""


class Place:
    """The folders of one run of this script.

    Attributes:
        given: data and checkpoints, which commands only read.
        work: the folder in which changes fail.
        before: a copy of `work` as it is before a command.
        output: file for what a command prints.
    """

    def __init__(self, folder: Path) -> None:
        self.given, self.work, self.before = (folder / n for n in ("given", "work", "before"))
        self.output, self._plan = folder / "output", folder / "plan"

    def allow(self, at: int = 0, kind: str = "full") -> None:
        """Lets all changes happen but number `at` from now on (0: all)."""
        with self._plan.open("r+b") as plan:
            plan.write(_PLAN.pack(0, at, *KINDS[kind], 0))

    def counted(self) -> tuple[int, bool]:
        """Number of changes since `allow`, and whether one of them failed."""
        count, _, _, _, failed = _PLAN.unpack(self._plan.read_bytes())
        return count, bool(failed)

    def restart(self) -> None:
        """Empties `work`."""
        self.allow()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def keep(self) -> None:
        """Keeps the content of `work` for `reset`."""
        shutil.rmtree(self.before, ignore_errors=True)
        shutil.copytree(self.work, self.before, symlinks=True)

    def reset(self) -> None:
        """Makes the content of `work` what it was."""
        self.allow()
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work, symlinks=True)


def files(folder: Path) -> list[Path]:
    """The files of a folder but hidden ones, logs, locks and caches."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in {"out.log", "run.lock"}
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and "cache" not in path.relative_to(folder).parts
    ]


def snapshot(folder: Path) -> Snapshot:
    """The contents of a folder's files, to be compared with those of the same command."""
    return {
        str(path.relative_to(folder)): _TIMES.sub(b"", path.read_bytes())
        for path in files(folder)
        if path.name != "SHA256SUMS"  # has a line for a checkpoint that could not be written
    }


def differences(found: Snapshot, wanted: Snapshot) -> str:
    """The names of files that differ."""
    names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    return f"other than undisturbed: {names}" if names else ""


def whole(path: Path) -> bool:
    """Whether a file can be read to its end, by its kind."""
    import numpy as np
    import yaml
    from PIL import Image
    from safetensors import safe_open

    from neuclip.checkpoint import storage

    def lines() -> None:
        for line in path.read_text("utf-8").split("\n")[:-1]:  # the last may be cut
            json.loads(line)

    def end(text: str) -> None:
        assert path.read_text("utf-8").rstrip().endswith(text)

    def archive() -> None:
        with tarfile.open(path) as tar:
            assert all(tar.extractfile(m).read() is not None for m in tar if m.isfile())

    readers: dict[str, Callable[[], object]] = {
        ".pt": lambda: storage.verify(path, of_run=True),
        ".json": lambda: json.loads(path.read_text("utf-8")),
        ".jsonl": lines,
        ".yaml": lambda: dict(yaml.safe_load(path.read_text("utf-8"))),
        ".html": lambda: end("</html>"),
        ".svg": lambda: end("</svg>"),
        ".png": lambda: Image.open(path).load(),
        ".tar": archive,
        ".npy": lambda: np.load(path),
        ".npz": lambda: dict(np.load(path)),
        ".safetensors": lambda: safe_open(path, "np").keys(),
    }
    try:
        readers.get(path.suffix, lambda: None)()
    except Exception:
        return False
    return path.stat().st_size > 0 or path.suffix == ".jsonl"


def preloaded() -> Place:
    """Starts this script anew with the library before all others, if it is not there yet."""
    if os.environ.get("NEUCLIP_FAULT_PLAN"):
        return Place(Path(os.environ["NEUCLIP_FAULT_PLAN"]).parent)
    folder = Path(tempfile.mkdtemp())
    library, plan = folder / "write_faults.so", folder / "plan"
    plan.write_bytes(bytes(_PLAN.size))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    work = folder / "work"
    environ = {
        "LD_PRELOAD": library, "NEUCLIP_FAULT_PLAN": plan, "NEUCLIP_FAULT_ROOT": work,
        "XDG_CACHE_HOME": work / "cache", "OMP_NUM_THREADS": 1, "MPLCONFIGDIR": folder / "mpl",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *sys.argv],
        env={**os.environ, **{key: str(value) for key, value in environ.items()}},
        check=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(done.returncode)
