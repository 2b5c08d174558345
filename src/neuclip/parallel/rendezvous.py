"""How processes find each other: a key-value store at MASTER_ADDR and MASTER_PORT.

torchrun hosts it and keeps it when it starts the processes again, with all that the dead ones
wrote; under srun process 0 hosts it. So each start agrees on a part of the store of its own.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from neuclip.errors import UserError
from neuclip.parallel.launch import Launch, here, meeting_point

log = logging.getLogger("neuclip")

_POLL = 0.05
_NAMED = 8
_QUIET = 30.0
"""Seconds after which a process says what it waits for."""


def hosts_store(launch: Launch) -> bool:
    """Whether the store ends with this process; torchrun hosts one that outlives all of them."""
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def meet(launch: Launch, timeout: timedelta) -> Store:
    """A store that exactly the processes of this start share.

    Raises:
        UserError: the port is taken, nobody answers there, or some processes do not come.
    """
    host, port = meeting_point(launch)
    try:
        with _saying_what_it_waits_for(launch, f"{host}:{port}", timeout.total_seconds()):
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                host,
                port,
                launch.world_size,
                hosts_store(launch),
                timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
            number = _welcome(launch, store, timeout) if launch.rank == 0 else _call(launch, store)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        seconds = timeout.total_seconds()
        raise UserError(_why_not(launch, host, port, seconds, str(error))) from None
    return PrefixStore(f"start/{number}", store)


@contextmanager
def _saying_what_it_waits_for(launch: Launch, place: str, seconds: float) -> Generator[None]:
    """One line of each process, should the block last: another may have failed before it met."""
    whom = "process 0" if launch.rank else f"all {launch.world_size} processes"
    said = (
        f"process {launch.rank} on {here()} still waits for {whom} at {place} (MASTER_ADDR, "
        f"MASTER_PORT), up to {seconds:g} s (--dist-timeout); one that failed says why itself"
    )
    timer = threading.Timer(_QUIET, log.warning, [said])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _welcome(launch: Launch, store: Store, timeout: timedelta) -> str:
    """Numbers this start, and tells the number to every process that calls."""
    number = str(store.add("starts", 1))
    end = time.monotonic() + timeout.total_seconds()
    answered: set[bytes] = set()
    came = f"start/{number}/came"
    while store.add(came, 0) < launch.world_size - 1:
        for rank in range(1, launch.world_size):
            # Calls of processes that are dead by now are answered too, and heard by nobody.
            call = store.get(f"call/{rank}") if store.check([f"call/{rank}"]) else b""
            if call and call not in answered:
                store.set(f"answer/{call.decode()}", number)
                answered.add(call)
        if time.monotonic() > end:
            missing = [
                rank
                for rank in range(1, launch.world_size)
                if not store.check([f"start/{number}/came/{rank}"])
            ]
            raise dist.DistStoreError(_missing(missing))
        time.sleep(_POLL)
    return number


def _call(launch: Launch, store: Store) -> str:
    """Asks process 0 for the number of this start; nobody else ever called by this name."""
    name = uuid.uuid4().hex
    store.set(f"call/{launch.rank}", name)
    number = store.get(f"answer/{name}").decode()
    store.set(f"start/{number}/came/{launch.rank}", "")
    store.add(f"start/{number}/came", 1)
    return number


def _missing(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED]))
    return f"missing: {shown}" + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def _why_not(launch: Launch, host: str, port: int, seconds: float, said: str) -> str:
    if "EADDRINUSE" in said:
        return (
            f"port {port} (MASTER_PORT) is in use on {here()}, by another run perhaps: export "
            "another MASTER_PORT on all processes, such as $((10000 + SLURM_JOB_ID % 20000))"
        )
    within = f"within {seconds:g} s (--dist-timeout): {said.splitlines()[0]}"
    if launch.rank == 0:
        return f"not all of the {launch.world_size} processes came to {host}:{port} {within}"
    return (
        f"process {launch.rank} on {here()} found no process 0 at {host}:{port} (MASTER_ADDR, "
        f"MASTER_PORT) {within}"
    )
