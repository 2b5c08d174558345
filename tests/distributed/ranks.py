"""Launched processes, each with its own environment, that tests can kill and pause.

A server that has imported torch and neuclip once forks them, so that starting one is cheap.
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
    # A suite that a shell runs in the background ignores Ctrl-C, and so would its processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Multiprocessing's own exit would wait for children; a launched process does not.
    sys.exit(task(*arguments))


def _enter(network: str) -> None:
    """Moves this process into a network namespace (os.setns is of Python 3.12)."""
    with Path("/run/netns", network).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {network}")


class Ranks:
    """Processes with the environment that srun gives them.

    Args:
        folder: for their output.
        size: number of processes.
        task: run by each process; its result is the exit code.
        arguments: of the task.
        nodes: additional environment variables, one mapping per process.
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
                target=_live, args=(environ, self._output_path(rank), task, arguments)
            )
            process.start()
            self.processes.append(process)

    def _output_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one of them."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def output(self, rank: int) -> str:
        """The output of one of them, joined into one line."""
        path = self._output_path(rank)
        return " ".join(path.read_text().split()) if path.exists() else ""

    def _all_output(self) -> dict[int, str]:
        return {rank: self.output(rank) for rank in range(self.size)}

    def wait_for_output(self, rank: int, words: str, seconds: float = 300) -> None:
        """Waits until one of them has printed some words."""
        end = time.monotonic() + seconds
        while words not in self.output(rank):
            if self.processes[rank].exitcode is not None or time.monotonic() > end:
                raise AssertionError(
                    f"rank {rank} never printed {words!r}, but: {self.output(rank)}"
                )
            time.sleep(0.02)

    def exit_codes(self, *ranks: int, seconds: float = 300) -> list[int | None]:
        """Waits for some of them to end, or all."""
        codes = []
        for rank in ranks or range(self.size):
            self.processes[rank].join(seconds)
            code = self.processes[rank].exitcode
            # It may wait for a process that ended before the rendezvous: show all outputs.
            assert code is not None, f"rank {rank} hangs; outputs: {self._all_output()}"
            codes.append(code)
        return codes

    def close(self) -> None:
        """Kills all processes."""
        for process in self.processes:
            process.kill()
            process.join()
