"""Two machines: network namespaces with an address each, joined by a cable that can be pulled."""

import os
import shutil
import subprocess

import pytest
from group_tasks import steps
from ranks import Ranks

from neuclip.parallel.process_group import WaitLimits

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

LIMITS = WaitLimits(timeout=60, silence=3)


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def nodes():
    """The environments of two processes, each on its own machine."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"neuclip{side}{os.getpid() % 10_000}" for side in "ab"]
    made = [ip("netns", "add", name) for name in names]
    if any(each.returncode for each in made):
        for name in names:
            ip("netns", "del", name)
        pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}")
    try:
        first, second = names
        ip("link", "add", "cable", "netns", first, "type", "veth",
           "peer", "name", "cable", "netns", second)  # fmt: skip
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield [
            {
                "NETWORK": name,
                "MASTER_ADDR": "10.77.0.1",
                "GLOO_SOCKET_IFNAME": "cable",
                "SLURM_LOCALID": "0",
            }
            for name in names
        ]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def run(tmp_path, nodes):
    started = []

    def start(count):
        started.append(Ranks(tmp_path, 2, steps, LIMITS, count, nodes=nodes))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_two_nodes_compute_together(run):
    both = run(20)
    assert both.exit_codes() == [0, 0]
    assert all(both.output(rank).endswith("finished") for rank in range(2))


def test_a_pulled_cable_ends_both(run, nodes):
    """No connection is closed: packets stop arriving."""
    both = run(10_000)
    both.wait_for_output(1, "step 5")
    ip("-n", nodes[1]["NETWORK"], "link", "set", "cable", "down")
    assert both.exit_codes() == [1, 1]
    assert "process 1 on" in both.output(0)
    assert "no sign of life" in both.output(0)
    assert "connection to MASTER_ADDR" in both.output(1)
