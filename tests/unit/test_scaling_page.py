"""docs/scaling.md cannot go stale: its tables are the script's, the towers' numbers open_clip's."""

import open_clip
import pytest
import torch
from test_docs import ROOT, script
from torch.utils.flop_counter import FlopCounterMode


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
