"""Saved in the middle of a run, every method goes on bit for bit."""

import io

import pytest
import torch
from naive_reference import pairs

from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError

VARIANTS = [(name, {}) for name in METHODS] + [
    ("neuclip", {"prototype_optimizer": "adagrad", "gradient": "union"}),
    ("neuclip", {"refresh": "rolling", "prototype_optimizer": "adam", "log_weights": True}),
    ("neuclip", {"prototype_optimizer": "sgd", "gradient": "full", "num_prototypes": 30}),
    ("neuclip_pool", {"pool_size": 20, "gradient_size": 9}),
    ("fastclip_v2", {"temperature_gradient": "fastclip"}),
    ("amorlip", {"fit_previous": False, "amortization": "js_div"}),
]


def steps(loss, numbers) -> list[torch.Tensor]:
    results = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randperm(48, generator=generator)[:6]
        leaf = pairs(6, seed=number).float().requires_grad_()
        scale = torch.tensor(12.0, requires_grad=True)
        value = loss(leaf[0], leaf[1], scale, torch.tensor(-9.0), sample_ids=ids)
        value.backward()
        results += [value.detach(), leaf.grad]
        results += [] if scale.grad is None else [scale.grad]
    return results


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_saved_state_goes_on_bit_for_bit(build, name, settings):
    torch.manual_seed(0)
    whole = build(name, double=False, **settings)
    steps(whole, range(5))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    resumed = build(name, double=False, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(steps(whole, range(5, 12)), steps(resumed, range(5, 12)), strict=True):
        assert torch.equal(one, other)
    for key, value in whole.state_dict().items():
        other = resumed.state_dict()[key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_a_state_without_owners_goes_on_as_if_they_were_untold(build):
    """Checkpoints of before 2026-11-27 do not say whose embeddings the pool has."""
    settings = {"inner_steps": 0, "refresh": "fifo", "num_prototypes": 20, "double": False}
    whole, resumed = build("neuclip", **settings), build("neuclip", **settings)
    steps(whole, range(5))
    state = whole.state_dict()
    for key in [key for key in state if key.endswith("owners")]:
        del state[key]
    resumed.load_state_dict(state)
    assert (resumed.normalizer.owners == -1).all()
    steps(resumed, range(5, 12))
    steps(whole, range(5, 12))  # by now the pool was filled anew
    for name in ("prototypes", "owners"):
        assert torch.equal(getattr(whole.normalizer, name), getattr(resumed.normalizer, name))


def test_a_state_of_another_size_is_refused_with_both_sizes(build):
    state = build("neuclip", num_prototypes=9).state_dict()
    with pytest.raises(UserError, match=r"has 9 prototypes.*has 7.*num_prototypes=9"):
        build("neuclip", num_prototypes=7).load_state_dict(state)
    state = build("fastclip_v3").state_dict()
    with pytest.raises(UserError, match=r"table \[2, 48\].*\[4, 48\]"):
        loss = build("isogclr")
        loss.temperature.load_state_dict(
            {key.removeprefix("normalizer."): value for key, value in state.items()}
        )


def test_table_methods_keep_8_bytes_a_sample(build):
    for name, size in {"fastclip_v3": 8, "scent": 8, "isogclr": 24, "fastclip_v2": 32}.items():
        loss = build(name, double=False)
        kept = sum(t.nbytes for key, t in loss.state_dict().items() if key.endswith("table.values"))
        assert kept == 48 * size, name
