"""Rendezvous: the processes of a run find each other in a store at MASTER_ADDR and MASTER_PORT.

Under srun, rank 0 hosts the key-value store. torchrun hosts its own, which survives a restart of
the processes with everything that the dead ones wrote. So rank 0 numbers each start, and the
processes of a start share a prefix of the store's keys.
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
from neuclip.parallel.launch import Launch, hostname, rendezvous_address

log = logging.getLogger("neuclip")

_POLL = 0.05
"""Seconds between two looks at the store."""

_NAMED = 8
"""Missing ranks listed in an error."""

_QUIET = 30.0
"""Seconds after which a waiting process logs what it waits for."""


def hosts_store(launch: Launch) -> bool:
    """Whether the store ends with this process; torchrun hosts one that outlives its processes."""
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def open_store(launch: Launch, timeout: timedelta) -> Store:
    """Opens a store that exactly the processes of this start share.

    Raises:
        UserError: the port is in use, rank 0 does not answer, or some processes do not arrive.
    """
    host, port = rendezvous_address(launch)
    try:
        with _logging_a_long_wait(launch, f"{host}:{port}", timeout.total_seconds()):
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                host,
                port,
                launch.world_size,
                hosts_store(launch),
                timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
            if launch.rank == 0:
                number = _admit_all(launch, store, timeout)
            else:
                number = _register(launch, store)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        seconds = timeout.total_seconds()
        raise UserError(_failure(launch, host, port, seconds, str(error))) from None
    return PrefixStore(f"start/{number}", store)


@contextmanager
def _logging_a_long_wait(launch: Launch, place: str, seconds: float) -> Generator[None]:
    """Logs one line if the block takes long: another process may have failed before its arrival."""
    whom = "process 0" if launch.rank else f"all {launch.world_size} processes"
    message = (
        f"process {launch.rank} on {hostname()} still waits for {whom} at {place} (MASTER_ADDR, "
        f"MASTER_PORT), up to {seconds:g} s (--dist-timeout); a failed process logs its own error"
    )
    timer = threading.Timer(_QUIET, log.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _admit_all(launch: Launch, store: Store, timeout: timedelta) -> str:
    """Numbers this start, and sends the number to every process that registers.

    Raises:
        DistStoreError: some processes did not arrive in time.
    """
    number = str(store.add("starts", 1))
    end = time.monotonic() + timeout.total_seconds()
    answered: set[bytes] = set()
    while store.add(f"start/{number}/arrived", 0) < launch.world_size - 1:
        for rank in range(1, launch.world_size):
            # Dead processes of earlier starts get an answer too; nobody reads it.
            call = store.get(f"call/{rank}") if store.check([f"call/{rank}"]) else b""
            if call and call not in answered:
                store.set(f"answer/{call.decode()}", number)
                answered.add(call)
        if time.monotonic() > end:
            missing = [
                rank
                for rank in range(1, launch.world_size)
                if not store.check([f"start/{number}/arrived/{rank}"])
            ]
            raise dist.DistStoreError(_missing(missing))
        time.sleep(_POLL)
    return number


def _register(launch: Launch, store: Store) -> str:
    """Asks rank 0 for the number of this start, under a name that no other process uses."""
    name = uuid.uuid4().hex
    store.set(f"call/{launch.rank}", name)
    number = store.get(f"answer/{name}").decode()
    store.set(f"start/{number}/arrived/{launch.rank}", "")
    store.add(f"start/{number}/arrived", 1)
    return number


def _missing(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED]))
    return f"missing: {shown}" + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def _failure(launch: Launch, host: str, port: int, seconds: float, cause: str) -> str:
    """The message for a failed rendezvous; `cause` is torch's own."""
    if "EADDRINUSE" in cause:
        return (
            f"port {port} (MASTER_PORT) is in use on {hostname()}, perhaps by another run: export "
            "another MASTER_PORT for all processes, such as $((10000 + SLURM_JOB_ID % 20000))"
        )
    within = f"within {seconds:g} s (--dist-timeout): {cause.splitlines()[0]}"
    if launch.rank == 0:
        return f"some of the {launch.world_size} processes did not reach {host}:{port} {within}"
    return (
        f"process {launch.rank} on {hostname()} found no process 0 at {host}:{port} (MASTER_ADDR, "
        f"MASTER_PORT) {within}"
    )
