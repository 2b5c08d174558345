"""Published steps, written independently, and this package's losses stay together for 72 steps."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import published_steps  # noqa: E402  not a package

sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("name", published_steps.EQUAL)
def test_a_method_trains_as_the_published_step(name):
    apart = published_steps.EQUAL[name].apart()
    assert max(apart.values()) < 1e-6, apart


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("FastCLIP-v2 before its commit c3ae1f5: no root", "temperature per sample"),
        ("SCENT with objective_scale fastclip", "embeddings"),
        ("SogCLR as a sum over negatives", "embeddings"),
    ],
)
def test_the_comparison_sees_another_form(name, key):
    assert published_steps.DEPARTURES[name].apart()[key] > 1e-4
