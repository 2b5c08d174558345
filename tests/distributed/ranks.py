"""Processes that really are launched: each with its own environment, to be killed and paused.

They are forked from a server that has imported torch and neuclip once, so that one costs nothing.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["neuclip.training.assemble", "group_tasks"])

Task = Callable[..., Any]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _live(environ: dict[str, str], output: Path, task: Task, arguments: tuple[Any, ...]) -> None:
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environ})
    if "NETWORK" in environ:
        _enter(environ["NETWORK"])
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Multiprocessing's own exit would wait for children; a real process ends like this.
    sys.exit(task(*arguments))


def _enter(network: str) -> None:
    """Moves this process into a network namespace (os.setns is of Python 3.12)."""
    with Path("/run/netns", network).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {network}")


class Ranks:
    """As many processes as wanted, started as srun starts them.

    Args:
        folder: of what they say.
        size: how many.
        task: what they do; its result is the exit code.
        arguments: of the task.
        nodes: environments that the processes get in addition, one each.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        task: Task,
        *arguments: Any,
        nodes: Sequence[Mapping[str, str]] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.size, self.folder = size, folder
        port = free_port()
        self.processes = []
        for rank in range(size):
            environ = {
                "SLURM_PROCID": str(rank),
                "SLURM_NTASKS": str(size),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_ID": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(nodes[rank] if nodes else {}),
            }
            process = CONTEXT.Process(
                target=_live, args=(environ, self._output(rank), task, arguments)
            )
            process.start()
            self.processes.append(process)

    def _output(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one of them."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def said(self, rank: int) -> str:
        """Everything that one of them wrote, on one line."""
        path = self._output(rank)
        return " ".join(path.read_text().split()) if path.exists() else ""

    def _all_said(self) -> dict[int, str]:
        return {rank: self.said(rank) for rank in range(self.size)}

    def wait_until_said(self, rank: int, words: str, seconds: float = 300) -> None:
        """Waits for one of them to write something."""
        end = time.monotonic() + seconds
        while words not in self.said(rank):
            if self.processes[rank].exitcode is not None or time.monotonic() > end:
                raise AssertionError(f"rank {rank} never said {words!r}, but: {self.said(rank)}")
            time.sleep(0.02)

    def exit_codes(self, *ranks: int, seconds: float = 300) -> list[int | None]:
        """Waits for some of them to end, or all."""
        codes = []
        for rank in ranks or range(self.size):
            self.processes[rank].join(seconds)
            code = self.processes[rank].exitcode
            # It may wait for another that ended before they met: that one says why.
            assert code is not None, f"rank {rank} hangs; they said: {self._all_said()}"
            codes.append(code)
        return codes

    def close(self) -> None:
        """Leaves nothing running."""
        for process in self.processes:
            process.kill()
            process.join()
