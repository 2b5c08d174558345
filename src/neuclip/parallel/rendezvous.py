"""Rendezvous: the processes of a run find each other in a store at MASTER_ADDR and MASTER_PORT.

Under srun, rank 0 hosts the key-value store. torchrun hosts its own, which survives a restart of
the processes with everything that the dead ones wrote. So rank 0 numbers each start, and the
processes of a start share a prefix of the store's keys.
"""

import ipaddress
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from neuclip.errors import UserError, printable
from neuclip.parallel.launch import Launch, hostname, rendezvous_address

log = logging.getLogger("neuclip")

_POLL = 0.05
"""Seconds between two looks at the store."""

_LOOK, _LOOKS = 5.0, 3
"""A listener that is there at so many looks, so many seconds apart, and has not answered cannot
be the store: process 0's answers at once."""
_SILENT = "silent listener"
_BACKLOG = 4096

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
        UserError: the port is in use, rank 0 does not answer, something else answers or is silent
            there, or some processes do not arrive.
    """
    host, port = rendezvous_address(launch)
    try:
        with _logging_a_long_wait(launch, f"{host}:{port}", timeout.total_seconds()):
            store = _store_in_time(launch, host, port, timeout)
            if launch.rank == 0:
                number = _admit_all(launch, store, timeout)
            else:
                number = _register(launch, store)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        seconds = timeout.total_seconds()
        raise UserError(_failure(launch, host, port, seconds, str(error))) from None
    return PrefixStore(f"start/{number}", store)


def _store_in_time(launch: Launch, host: str, port: int, timeout: timedelta) -> Store:
    """Opens the store in a thread: torch's handshake with a listener that is silent never ends.

    Raises:
        DistStoreError: something listens at the address, and does not answer as a store.
    """
    opened: Future[Store] = Future()

    def open_it() -> None:
        try:
            opened.set_result(_tcp_store(launch, host, port, timeout))
        except Exception as error:  # raised again in the main thread
            opened.set_exception(error)

    threading.Thread(target=open_it, name="neuclip-rendezvous", daemon=True).start()
    unanswered = 0
    while True:
        wait([opened], _LOOK)
        if opened.done():
            return opened.result()
        # Nobody listens until process 0 starts: torch tries again until the timeout.
        unanswered = unanswered + 1 if _accepts(host, port) else 0
        if unanswered == _LOOKS:
            raise dist.DistStoreError(_SILENT)


def _tcp_store(launch: Launch, host: str, port: int, timeout: timedelta) -> Store:
    hosts = hosts_store(launch)
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host,
        port,
        launch.world_size,
        hosts,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=_loopback_listener(host, port) if hosts else None,
    )


def _loopback_listener(host: str, port: int) -> int | None:
    """A socket that only this machine reaches, if the address is this machine's own.

    Otherwise, None: torch's store listens on all interfaces, without a secret.
    """
    try:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            return None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            ("127.0.0.1" if host == "localhost" else host, port), family=family, backlog=_BACKLOG
        )
    except (OSError, ValueError):
        return None  # another name; or the port is taken, which torch reports
    return listener.detach()


def _accepts(host: str, port: int) -> bool:
    """Whether something listens at an address."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


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
                store.set(f"answer/{call.decode(errors='replace')}", number)
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
    number = store.get(f"answer/{name}").decode(errors="replace")
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
    if _SILENT in cause:
        return (
            f"process {launch.rank} on {hostname()} found something else than process 0 at "
            f"{host}:{port} (MASTER_ADDR, MASTER_PORT): it accepts connections and does not "
            f"answer. Free the port there, or export another MASTER_PORT for all processes"
        )
    within = f"within {seconds:g} s (--dist-timeout): {printable(cause.splitlines()[0], 300)}"
    if launch.rank == 0:
        return f"some of the {launch.world_size} processes did not reach {host}:{port} {within}"
    return (
        f"process {launch.rank} on {hostname()} found no process 0 at {host}:{port} (MASTER_ADDR, "
        f"MASTER_PORT) {within}"
    )
