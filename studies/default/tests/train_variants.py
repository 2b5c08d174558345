"""Trains every variant of the pool. A process of its own: importing `ideas` registers them."""

import torch
from studies.default.ideas import VARIANTS
from studies.default.plan import INGREDIENTS, Cell
from torch.nn.functional import normalize

from neuclip.catalogue.create import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.config.resolve import resolve


def train(name: str) -> None:
    settings = {"pool_size": 64, "gamma": 0.4, "gamma_decay_epochs": 1.0}
    loss = create_loss(name, embed_dim=8, steps_per_epoch=2, **settings)
    assert type(loss.normalizer) is VARIANTS[name]
    for step in range(12):
        features = normalize(torch.randn(2, 8, 8), dim=-1).requires_grad_()
        ids = torch.arange(8 * step, 8 * step + 8) % 40
        loss(features[0], features[1], torch.tensor(10.0), sample_ids=ids).backward()
        assert torch.isfinite(features.grad).all()


def check_cells(folder) -> None:
    """The ingredients of a variant are cells with valid settings."""
    variants = [change for change in INGREDIENTS.values() if change.get("name") in VARIANTS]
    assert {change["name"] for change in variants} == set(VARIANTS)
    for change in variants:
        cell = Cell("ingredient", "x", {"pool_size": 64, **change}, 1e-3)
        assert resolve(cell.config(folder, folder), 1).method.method == change["name"]


if __name__ == "__main__":
    from pathlib import Path

    torch.set_num_threads(1)
    assert set(VARIANTS) <= set(METHODS)
    check_cells(Path("unused"))
    for variant in VARIANTS:
        train(variant)
        print(variant)
