"""The probe on frozen embeddings."""

import math

import torch
from studies.default import probe as probe_module
from torch.nn.functional import normalize


def test_every_estimator_of_the_probe_is_finite_and_more_prototypes_are_better(monkeypatch):
    monkeypatch.setattr(probe_module, "ANCHORS", 128)
    monkeypatch.setattr(probe_module, "POOL", 2048)
    features = normalize(torch.randn(2, 2500, 8), dim=-1)
    probe = probe_module.Probe(features, 10.0, seed=0)
    mse = {
        name: float((estimate(probe) - probe.exact).square().mean())
        for name, estimate in probe_module.estimators(steps=2).items()
    }
    assert all(math.isfinite(value) for value in mse.values()), mse
    assert mse["pool, m 2048"] < mse["pool, m 512"] < mse["pool, m 64"]
    assert mse["pool 2048 and batch, by counts"] < mse["batch of 64"]
