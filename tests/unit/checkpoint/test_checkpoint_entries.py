"""Files without checksums whose entries are not as neuclip writes them: one line each."""

import pytest
import torch
from torch import nn

from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.entries import own_entry, restoring
from neuclip.errors import UserError
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.opened_checkpoint import open_checkpoint

ARCHITECTURE = {
    "name": "glyph-tiny",
    "model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}},
    "preprocess_cfg": {},
    "resized": None,
}


@pytest.mark.parametrize(
    "own",
    [
        7,
        [1],
        "text",
        {1: 2},
        {"step": "4"},
        {"step": -1},
        {"step": True},
        {"step": 2.0},
        {"step": 10**400},
        {"steps_per_epoch": 0},
        {"global_batch_size": None},
        {"num_samples": [3]},
        {"config": {"seed": 1}},
        {"config": torch.zeros(1)},
        {"loss": []},
        {"damage": {}},
        {"damage": {"total": 1, "by_kind": [], "examples": []}},
        {"damage": {"total": 1, "by_kind": {"image": "x"}, "examples": []}},
        {"rng": "state"},
        {"architecture": "ViT-B-32"},
    ],
    ids=repr,
)
def test_wrong_entries_are_one_line(tmp_path, own):
    with pytest.raises(CheckpointError, match=r"x\.pt is not as neuclip wrote it: its entry") as e:
        own_entry({"neuclip": own}, tmp_path / "x.pt")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_missing_entry_is_named_where_it_is_used(tmp_path):
    own = own_entry({"neuclip": {"step": 3}}, tmp_path / "x.pt")
    assert own["step"] == 3 and own.get("loss") is None
    with pytest.raises(CheckpointError, match="it has no entry neuclip/loss"):
        own["loss"]
    assert own_entry({"state_dict": {}}, tmp_path / "x.pt") is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({}, "it has no entry neuclip/config"),
        ({"config": "a: &a [*a]"}, "the recorded configuration: the alias"),
        ({"config": "[" * 900}, "nested deeper"),
        ({"config": "a: ["}, "is not YAML"),
        ({"config": "- a"}, "has no sections"),
        ({"config": "model: 3"}, "unknown model '3'"),
        ({"config": "optim: {lr: 0x" + "f" * 30 + "}"}, "unknown model 'None'"),
        ({"architecture": {}}, "neuclip/architecture is malformed"),
        ({"architecture": {**ARCHITECTURE, "name": 4}}, "neuclip/architecture is malformed"),
        ({"architecture": {**ARCHITECTURE, "resized": [1, "x"]}}, "architecture is malformed"),
        ({"architecture": {**ARCHITECTURE, "resized": "x"}}, "architecture is malformed"),
        ({"architecture": {**ARCHITECTURE, "model_cfg": []}}, "no embed_dim, vision_cfg, text_cfg"),
        (
            {"architecture": {**ARCHITECTURE, "model_cfg": {"embed_dim": "x", "text_cfg": 1}}},
            "no embed_dim, vision_cfg, text_cfg",
        ),
    ],
)
def test_recorded_architectures_and_settings(tmp_path, own, message):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": nn.Linear(2, 3).state_dict(), "neuclip": own}, path)
    checkpoint = open_checkpoint(CheckpointChoice(path))
    with pytest.raises(UserError, match=message):
        _ = checkpoint.recorded_architecture


@pytest.mark.parametrize(
    "error", [KeyError("exp_avg"), TypeError("x"), AttributeError("x"), IndexError(), ValueError()]
)
def test_state_that_does_not_fit_is_one_line(tmp_path, error):
    with pytest.raises(CheckpointError, match=type(error).__name__), restoring(tmp_path / "x.pt"):
        raise error
    with pytest.raises(RuntimeError, match="out of memory"), restoring(tmp_path / "x.pt"):
        raise RuntimeError("out of memory")
