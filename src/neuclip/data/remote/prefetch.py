"""A process that downloads shards before they are read.

It is a process and not a thread so that it takes no interpreter lock from the training, and does
not disturb the fork of its workers. It reads lines of JSON from its parent: first the cache and the
shards, then, each time they change, the indices of the shards that will be read next, in order. It
ends with its parent. Readers download missing shards themselves, so prefetching only saves waiting.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import neuclip
from neuclip.data.remote.cache import NoRoomError, RemoteShard, ShardCache
from neuclip.data.remote.fetch import Expected, RetryPolicy
from neuclip.data.remote.transport import FetchError
from neuclip.data.sources.tar_index import index_shard
from neuclip.errors import UserError

_AT_ONCE = 4  # simultaneous downloads
_FULL = 0.2  # seconds until a full cache is checked again
_log = logging.getLogger(__name__)


class Prefetcher:
    """Starts and controls the process, from the parent."""

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard]) -> None:
        self._setup = {
            "folder": str(cache.folder),
            "limit": cache.limit,
            "retry": asdict(cache.retry),
            "shards": [asdict(shard) for shard in shards],
        }
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def want(self, numbers: Sequence[int]) -> None:
        """Downloads these shards next, in this order, instead of those requested before."""
        if os.getpid() != self._owner:
            return  # a forked worker: the main process prefetches
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
            self._send(self._setup)
        self._send(list(numbers))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and os.getpid() == self._owner:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _send(self, message: object) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            _log.debug("the prefetching process has ended: %s", error)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be going down
            self.close()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        # -P: a file of the working folder must not take the place of a module.
        [sys.executable, "-P", "-c", "from neuclip.data.remote.prefetch import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths())},
        start_new_session=True,  # not reached by signals to the training's group
    )


def _import_paths() -> list[str]:
    """Where this process imports from, but for the working folder that `python -m` adds."""
    added = None if sys.flags.safe_path else str(Path.cwd())
    package = str(Path(neuclip.__file__).parent.parent)
    return [path for path in sys.path if path and (path != added or path == package)]


class _Wanted:
    """The shards to download next, shared by the downloading threads."""

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard]) -> None:
        self._cache, self._shards = cache, shards
        self._changed = threading.Condition()
        self._numbers: list[int] = []
        self._paths: frozenset[Path] = frozenset()
        self._taken: set[int] = set()

    def replace(self, numbers: list[int]) -> None:
        """Replaces the shards to download."""
        with self._changed:
            self._numbers = list(numbers)
            self._paths = frozenset(self._cache.path(self._shards[n]) for n in numbers)
            self._changed.notify_all()

    def work(self) -> None:
        """Downloads in an endless loop."""
        while True:
            with self._changed:
                while not self._numbers:
                    self._changed.wait()
                number = self._numbers.pop(0)
                if number in self._taken:
                    continue
                self._taken.add(number)
            if not self._fetch(number):
                time.sleep(_FULL)
            with self._changed:
                self._taken.discard(number)

    def _fetch(self, number: int) -> bool:
        """Downloads and indexes one shard; returns False if it must be tried again."""
        shard = self._shards[number]
        try:
            if self._cache.fetch(shard, self._paths):
                index_shard(self._cache.path(shard))  # saved to a file, so readers need not scan
        except NoRoomError:
            with self._changed:
                self._numbers.insert(0, number)
            return False
        except (FetchError, UserError, OSError):
            pass  # the reader gets the same error, and knows which sample is lost
        return True


def main() -> None:
    """Runs the process: reads requests from the standard input until it closes."""
    setup = json.loads(sys.stdin.readline())
    shards = [
        RemoteShard(shard["url"], Expected(**shard["expected"]), shard["samples"])
        for shard in setup["shards"]
    ]
    cache = ShardCache(Path(setup["folder"]), setup["limit"], RetryPolicy(**setup["retry"]))
    wanted = _Wanted(cache, shards)
    for _ in range(_AT_ONCE):
        threading.Thread(target=wanted.work, daemon=True).start()
    for line in sys.stdin:
        wanted.replace(json.loads(line))
    os._exit(0)
