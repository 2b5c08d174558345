"""The formulas of docs/scaling.md against bytes and operations counted in real runs."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from counting import BATCH, DIM, count
from test_distributed_losses import Task, task

from neuclip.catalogue import cost
from neuclip.catalogue.registry import METHODS
from small_memory import small_memory

pytestmark = pytest.mark.distributed

PATH = Path(__file__).parents[2] / "scripts" / "scaling_table.py"
spec = importlib.util.spec_from_file_location("scaling_table", PATH)
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

PROTOTYPES, STEPS = 24, 3
NETWORK = {"num_prototypes": PROTOTYPES, "inner_steps": STEPS, "restart_steps": 1000}
CASES = {name: task(name) for name in METHODS}
CASES["neuclip"] = task("neuclip", **NETWORK)
CASES["neuclip, full or union"] = task("neuclip", gradient="full", **NETWORK)
CASES["fastclip_v3, GloFND"] = task("fastclip_v3", glofnd_alpha=0.2, glofnd_start=1.0)
CASES["neuclip_pool, GloFND"] = task(
    "neuclip_pool", pool_size=PROTOTYPES, glofnd_alpha=0.2, glofnd_start=1.0
)
CASES["rgcl_queue, moments"] = task("rgcl_queue", queue_size=PROTOTYPES, queue_alignment="moments")
CASES |= {
    name: task(name, **memory) for name in METHODS if (memory := small_memory(name, PROTOTYPES))
}


def setup(ranks: int):
    return scaling.Setup(
        ranks, BATCH, DIM, PROTOTYPES, prototype_steps=STEPS, network_steps=3, hidden=DIM
    )


def test_every_method_has_a_formula():
    assert set(scaling.COSTS) == set(CASES)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_bytes_and_operations_equal_the_formulas(pool, case, ranks):
    expected = scaling.COSTS[case](setup(ranks))
    for counted in pool.run(ranks, count, CASES[case]):
        assert counted.sent["gathered"] == expected.gathered
        assert counted.sent["scattered"] == expected.scattered
        assert counted.sent["reduced"] == expected.reduced
        assert counted.messages == expected.messages
        assert counted.flops == expected.flops


@pytest.mark.parametrize(("case", "sums"), [("openclip", 1), ("neuclip_pool", 2 + BATCH)])
def test_bytes_and_operations_of_groups_weights_and_hard_negatives(pool, case, sums):
    """Sums of weights (a side each where anchors are left out), and what remains of the pool."""
    given = cost.groups(setup(2), kinds=2) + cost.hard_negatives(setup(2))
    reduced = cost.Cost(reduced=sums * cost.FLOAT, messages=1 if case == "openclip" else 2)
    expected = scaling.COSTS[case](setup(2)) + given + reduced
    for counted in pool.run(2, count, replace(CASES[case], options=True)):
        assert counted.sent["gathered"] == expected.gathered
        assert counted.sent["scattered"] == expected.scattered
        assert counted.sent["reduced"] == expected.reduced
        assert counted.messages == expected.messages
        assert counted.flops == expected.flops


def test_prototypes_cost_each_of_k_ranks_one_kth(pool):
    """Operations, bytes of state, and the largest tensor, beyond those of the loss without them."""
    many = Task("neuclip", {**CASES["neuclip"].settings, "num_prototypes": 240})
    found = {ranks: pool.run(ranks, count, many)[0] for ranks in (1, 2, 4)}
    plain = {ranks: pool.run(ranks, count, Task("rgcl_batch"))[0] for ranks in (1, 2, 4)}
    for ranks in (2, 4):
        network = {k: found[k].flops - plain[k].flops for k in (1, ranks)}
        assert network[ranks] * ranks == network[1]
        assert found[ranks].largest * ranks == found[1].largest == 2 * 240 * BATCH
        rows = 2 * 240 * 2 * DIM * 4  # both sides' embeddings, network and ring
        scalars = found[1].owned_bytes - rows  # of the optimisers
        assert found[ranks].owned_bytes - scalars == rows // ranks
