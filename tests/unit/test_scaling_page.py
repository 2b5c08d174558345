"""docs/scaling.md cannot go stale: its tables are the script's, the towers' numbers open_clip's."""

from dataclasses import replace

import open_clip
import pytest
import torch
from test_docs import ROOT, script
from torch.utils.flop_counter import FlopCounterMode

from neuclip.catalogue import roofline
from neuclip.catalogue.cost import Setup, prototypes


def test_the_tables_are_what_the_script_writes():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert script("scaling_table").with_tables(page) == page


def test_the_towers_weights_and_operations():
    scaling = script("scaling_table")
    with torch.device("meta"):
        towers = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32"))
        images, tokens = torch.empty(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.long)
    assert sum(weight.numel() for weight in towers.parameters()) == scaling.TOWER_WEIGHTS
    with FlopCounterMode(display=False) as counter:
        image, text, _ = towers(images, tokens)
        (image.sum() + text.sum()).backward()
    counted = counter.get_total_flops() / 2
    # How attention is counted depends on the release of torch.
    assert counted == pytest.approx(scaling.TOWER_FLOPS_OF_A_PAIR, rel=0.03)


def test_the_roofline_counts_the_towers_operations_as_torch_does():
    scaling = script("scaling_table")
    forward = sum(work.flops for work in roofline.encoders(1, times=1))
    # Patches get no gradient, so the backward pass has a little less than twice as many.
    assert 3 * forward == pytest.approx(scaling.TOWER_FLOPS_OF_A_PAIR, rel=0.02)
    assert roofline.WEIGHTS == scaling.TOWER_WEIGHTS


def test_the_roofline_of_the_loss_has_the_products_of_its_cost():
    setup = Setup(ranks=1, batch=512, prototypes=4096)
    steps = sum(work.flops for work in roofline.inner_steps(512, 4096, setup.prototype_steps))
    assert steps == prototypes(setup, through=False).flops
    read = sum(work.flops for work in roofline.pool_normalizer(512, 4096))
    assert read == prototypes(replace(setup, prototype_steps=0), through=True).flops


def test_work_takes_the_longer_of_operations_and_bytes():
    card = roofline.Card("", tensor=10.0, float32=2.0, bandwidth=5.0)
    assert roofline.Work(20, 5).seconds(card) == 2
    assert roofline.Work(20, 15).seconds(card) == 3
    assert roofline.Work(20, 15, "float32").seconds(card) == 10
    part = roofline.Work(20, 5), roofline.Work(0, 5)
    assert roofline.part_seconds(part, card) == 3
