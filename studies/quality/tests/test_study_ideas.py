"""Variants of the normalizer, and small encoders."""

import dataclasses
import math

import pytest
import small
import torch
from ideas import IDEAS, using
from plan import Cell
from torch.nn.functional import normalize

from neuclip.catalogue.create import create_loss


def test_small_towers_learn_and_are_judged(demo_dir):
    data = small.Data(demo_dir)
    method = {"name": "neuclip", "num_prototypes": 128}
    run = small.SmallRun(Cell("tune", "x", method, 1e-3, batch=16, measures=True), data)
    run.steps = 20
    run.cell = dataclasses.replace(run.cell, epochs=2)
    found = run.train()
    assert {row["split"] for row in found["evaluations"]} == set(small.SPLITS)
    assert all(math.isfinite(row["mse"]) for row in found["errors"])


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_is_what_the_pool_is_built_with_inside(idea):
    settings = {
        "pool_size": 64,
        "gradient": "full",
        "gamma": 0.4,
        "gamma_decay_epochs": 1.0,
    }

    def build():
        return create_loss("neuclip_pool", embed_dim=8, steps_per_epoch=2, **settings)

    with using(idea):
        loss = build()
    assert type(loss.normalizer) is IDEAS[idea]
    assert type(build().normalizer) not in IDEAS.values()
    for _ in range(12):
        features = normalize(torch.randn(2, 8, 8), dim=-1).requires_grad_()
        value = loss(features[0], features[1], torch.tensor(10.0))
        value.backward()
    assert torch.isfinite(features.grad).all()
