"""What the suite itself relies on."""

import os

import pytest


@pytest.mark.xdist_group("one")
def test_groups_are_known_to_xdist(request):
    """Without them, each worker starts a pool of processes of its own, and the machine is full."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process: nothing is grouped")
    assert request.node.nodeid.endswith("@one")
