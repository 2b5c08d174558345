"""Float64 losses of every method, ready to be called."""

from collections.abc import Callable

import pytest

from neuclip.catalogue.create import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.method.losses.pair_loss import PairLoss
from small_memory import small_memory

DIM = 8
SAMPLES = 48
NETWORK = {
    "num_prototypes": 7,
    "restart_steps": 3,
    "inner_steps": 2,
    "prototype_lr": 0.3,
    "refresh": "restart",
    "gradient": "detached",
}

BuildLoss = Callable[..., PairLoss]


@pytest.fixture
def build() -> BuildLoss:
    """A float64 loss by name; schedules and sizes are filled in where the method needs them."""

    def build(name: str, *, steps_per_epoch: int = 2, double: bool = True, **settings) -> PairLoss:
        fields = METHODS[name].settings.model_fields
        if "gamma_schedule" in fields:
            settings = {"gamma": 0.3, "gamma_decay_epochs": 4.0, **settings}
        if name == "neuclip":
            settings = {"rho": 6.5, "epsilon": 1e-14, **NETWORK, **settings}
            settings = {"temperature_gradient": "exact", **settings}
        settings = {**small_memory(name, 7), **settings}
        loss = create_loss(
            name,
            embed_dim=DIM,
            steps_per_epoch=steps_per_epoch,
            num_samples=SAMPLES,
            **settings,
        )
        return loss.double() if double else loss

    return build
