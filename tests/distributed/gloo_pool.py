"""Gloo processes, started once; they form a new group for every task."""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # pipes take tensors
from ranks import CONTEXT

TIMEOUT = 180.0
"""Seconds after which a task counts as hanging."""


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        task = pipe.recv()
        if task is None:
            return
        function, rank, size, store, arguments = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size
            )
            # A fast rank must not leave the group while another is still connecting to it.
            dist.barrier()
            try:
                pipe.send((True, function(*arguments)))
            finally:
                dist.destroy_process_group()
        except Exception:
            pipe.send((False, traceback.format_exc()))


class GlooPool:
    """Up to `size` processes; a hanging task kills them and fails."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self.tasks = 0
        self.workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        for _ in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns a function's results on ranks 0 to size - 1 of a new group."""
        if not self.workers:
            self._start()
        self.tasks += 1
        store = self.folder / str(self.tasks)
        pipes = [pipe for _, pipe in self.workers[:size]]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, size, store, arguments))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise AssertionError(f"rank {rank} of {size} did not answer in {TIMEOUT:g} s")
            try:
                fine, result = pipe.recv()
            except EOFError:
                self.close()
                raise AssertionError(f"rank {rank} of {size} died") from None
            if not fine:
                # The others may wait for this rank forever: start new processes next time.
                self.close()
                raise AssertionError(f"rank {rank} of {size}:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []
