"""Every method resumes bit for bit from its state_dict, which has the stated size."""

import io
import re

import pytest
import torch
from naive_reference import pairs

from momentum_keys import keys_for
from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError
from small_memory import small_memory

VARIANTS = [(name, {}) for name in METHODS] + [
    ("neuclip", {"prototype_optimizer": "adagrad", "gradient": "union"}),
    ("neuclip", {"refresh": "rolling", "prototype_optimizer": "adam", "log_weights": True}),
    ("neuclip", {"prototype_optimizer": "sgd", "gradient": "full", "num_prototypes": 30}),
    ("neuclip_pool", {"pool_size": 20}),
    ("neuclip_pool", {"pool_size": 20, "gradient": "union", "gradient_size": 9}),
    ("infonce_queue", {"queue_size": 20}),
    ("infonce_queue", {"queue_size": 20, "queue_alignment": "moments"}),
    ("rgcl_queue", {"queue_size": 20}),
    ("moco", {"queue_size": 20}),
    ("infonce_queue", {"glofnd_alpha": 0.3, "glofnd_start": 2.0}),
    ("fastclip_v3", {"glofnd_alpha": 0.3, "glofnd_start": 1.0, "glofnd_lr": 0.6}),
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
        given = {"sample_ids": ids, **keys_for(loss, leaf)}
        value = loss(leaf[0], leaf[1], scale, torch.tensor(-9.0), **given)
        value.backward()
        results += [value.detach(), leaf.grad]
        results += [] if scale.grad is None else [scale.grad]
    return results


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_resumed_loss_is_bit_identical(build, name, settings):
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


def test_a_state_with_the_sample_ids_of_prototypes_is_loaded(build):
    """States of before 2026-11-28 have them; trained prototypes belong to no pair."""
    before, after = build("neuclip"), build("neuclip")
    steps(before, range(3))
    state = before.state_dict()
    state |= {f"normalizer.{key}": torch.full((1, 7), -1) for key in ("owners", "ring.owners")}
    after.load_state_dict(state)
    for one, other in zip(steps(before, range(3, 6)), steps(after, range(3, 6)), strict=True):
        assert torch.equal(one, other)


def test_loading_a_state_of_another_size_is_refused_with_both_sizes(build):
    state = build("neuclip", num_prototypes=9).state_dict()
    with pytest.raises(UserError, match=r"has 9 prototypes.*has 7.*num_prototypes=9"):
        build("neuclip", num_prototypes=7).load_state_dict(state)
    state = build("neuclip_pool", pool_size=9).state_dict()
    with pytest.raises(UserError, match=r"has 9 prototypes.*has 7.*pool_size=9"):
        build("neuclip_pool", pool_size=7).load_state_dict(state)
    state = build("fastclip_v3").state_dict()
    with pytest.raises(UserError, match=r"table \[2, 48\].*\[4, 48\]"):
        loss = build("isogclr")
        loss.temperature.load_state_dict(
            {key.removeprefix("normalizer."): value for key, value in state.items()}
        )


def state_numbers(name: str, d: int, n: int, m: int) -> int:
    """The numbers in a method's state, by the text of the catalogue.

    Args:
        name: the method.
        d: width of the embeddings.
        n: samples.
        m: prototypes of each side, or embeddings of each side in the pool.
    """
    stated = re.match(r"\d+", METHODS[name].state)
    factor = int(stated[0]) if stated else 0
    if METHODS[name].needs_sample_ids:
        return factor * n
    rest = {"neuclip": 12, "amorlip": 4 * d + 16}  # optimisers, step counts
    unit = {"neuclip": m * d, "amorlip": 2 * d * d + 7 * d + 1}
    if small_memory(name, m):  # embeddings and their ids
        unit[name], rest[name] = m * d, m
    return factor * unit.get(name, 0) + rest.get(name, 0)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_has_the_size_that_the_catalogue_says(build, name):
    sizes = {"num_prototypes": 9} if name == "neuclip" else small_memory(name, 9)
    loss = build(name, double=False, **sizes)
    steps(loss, range(3))
    found = sum(value.numel() for value in loss.state_dict().values() if torch.is_tensor(value))
    assert found == state_numbers(name, d=8, n=48, m=9)


def test_tables_hold_4_bytes_a_number(build):
    for name in ("fastclip_v3", "scent", "isogclr", "fastclip_v2"):
        for key, value in build(name, double=False).state_dict().items():
            assert not key.endswith("table.values") or value.dtype == torch.float32, name
