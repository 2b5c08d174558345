"""The error of the log-normalizers at the end of a run, for every method of the study."""

import math

import pytest
import torch
from studies.quality.recipes import METHODS, RECIPES
from studies.shared.error import error_of
from torch.nn.functional import normalize

from neuclip.catalogue.create import create_loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_after_training(method):
    recipe = RECIPES[method]
    settings = {key: value for key, value in recipe.settings.items() if key != "name"}
    if "num_prototypes" in settings:
        settings |= {"num_prototypes": 16, "restart_steps": 2}
    loss = create_loss(
        method, embed_dim=4, num_samples=40, global_batch_size=8, steps_per_epoch=5, total_steps=10,
        **settings,
    )  # fmt: skip
    features, ids = normalize(torch.randn(2, 40, 4), dim=-1), torch.arange(40)
    for rows in ids.split(8):
        batch = features[:, rows].clone().requires_grad_()
        keys = {"key_features": features[:, rows]} if method == "moco" else {}
        others = {"logit_bias": torch.tensor(-10.0)} if method == "siglip" else {}
        loss(*batch, torch.tensor(10.0), sample_ids=rows, **keys, **others).backward()
    error = error_of(features, ids, loss, 10.0, batch=8, anchors=24)
    assert error["minibatch_mse"] > 0
    assert ("mse" in error) == loss.predicts_log_normalizers
    assert all(math.isfinite(value) for value in error.values())
