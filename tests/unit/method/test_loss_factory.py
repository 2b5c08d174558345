"""Losses by name, and what is said of names and settings that do not fit."""

import re

import pytest

from neuclip import create_loss
from neuclip.catalogue.registry import (
    CATALOGUE,
    METHODS,
    NeuCLIPSettings,
    OpenCLIPSettings,
    method_settings,
)
from neuclip.errors import UserError
from neuclip.method.factory import Run, build_loss, resolve
from neuclip.method.losses.pair_loss import PairLoss

TABLE_METHODS = [info.name for info in CATALOGUE if info.needs_sample_ids]
EPOCH_METHODS = [info.name for info in CATALOGUE if info.counts_epochs]


def fitting(name: str) -> dict[str, float]:
    if {"gamma_schedule", "name"} <= METHODS[name].settings.model_fields.keys() and name != "scent":
        return {"gamma": 0.5, "gamma_decay_epochs": 2.0}
    return {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_from_the_catalogue(name):
    loss = create_loss(name, embed_dim=4, steps_per_epoch=3, num_samples=10, **fitting(name))
    assert isinstance(loss, PairLoss)
    assert loss.needs_sample_ids == METHODS[name].needs_sample_ids
    same = build_loss(method_settings(name, fitting(name)), Run(4, 3, num_samples=10))
    assert [*same.state_dict()] == [*loss.state_dict()]


def test_which_methods_hold_the_temperature_constant():
    constant = {
        name
        for name in METHODS
        if not create_loss(
            name, embed_dim=4, steps_per_epoch=3, num_samples=10, **fitting(name)
        ).learns_temperature
    }
    assert constant == {"sogclr", "isogclr", "fastclip_v1", "fastclip_v2"}


@pytest.mark.parametrize("name", TABLE_METHODS)
def test_table_methods_ask_for_the_number_of_samples(name):
    with pytest.raises(UserError, match=rf"{name}.*num_samples="):
        create_loss(name, embed_dim=4, steps_per_epoch=3, **fitting(name))


@pytest.mark.parametrize("name", EPOCH_METHODS)
def test_schedules_in_epochs_ask_for_the_length_of_an_epoch(name):
    with pytest.raises(UserError, match=rf"{name}.*steps_per_epoch="):
        create_loss(name, embed_dim=4, num_samples=10, **fitting(name))


def test_other_methods_need_neither():
    for name in set(METHODS) - set(TABLE_METHODS) - set(EPOCH_METHODS):
        create_loss(name, embed_dim=4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("neuclp", {}, "unknown method 'neuclp'; did you mean 'neuclip'? known: amorlip, fastclip"),
        ("neuclip", {"num_prototype": 3}, "no setting 'num_prototype'; did you mean 'num_prototy"),
        ("openclip", {"rho": 3.0}, "method 'openclip' has no setting 'rho'; known: temperature"),
        ("rgcl_batch", {"rho": -1.0}, "rho: Input should be greater than or equal to 0 (got -1.0)"),
        ("neuclip", {"refresh": "lifo"}, "refresh: Input should be 'restart', 'fifo' or 'rolling'"),
        ("sogclr", {"gamma": 0.0}, "gamma: Input should be greater than 0"),
        ("neuclip", {"gamma": None}, "method 'neuclip': pass gamma="),
        ("neuclip", {}, "method 'neuclip': pass gamma_decay_epochs="),
        ("neuclip", {"gamma": 2.0}, "gamma: Input should be less than or equal to 1 (got 2.0)"),
        (
            "isogclr",
            {"temperature": 0.5},
            "method 'isogclr': temperature 0.5 must lie between temperature_min 0.005 and "
            "temperature_max 0.05",
        ),
    ],
)
def test_wrong_names_and_settings(name, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        create_loss(name, embed_dim=4, steps_per_epoch=3, num_samples=10, **settings)


@pytest.mark.parametrize(
    "key", ["embed_dim", "steps_per_epoch", "num_samples", "global_batch_size"]
)
def test_sizes_below_one(key):
    sizes = {"embed_dim": 4, "steps_per_epoch": 3, "num_samples": 10, key: 0}
    with pytest.raises(UserError, match=f"{key} 0: must be at least 1"):
        create_loss("fastclip_v3", gamma=0.5, gamma_schedule="constant", **sizes)


def test_the_catalogue_says_what_the_settings_are():
    for info in CATALOGUE:
        assert info.settings.model_config["frozen"]
        assert info.summary
        assert info.formula.strip()
        assert info.paper
        for key, field in info.settings.model_fields.items():
            assert key == "name" or field.description, (info.name, key)


@pytest.mark.parametrize(
    ("settings", "size", "newest"),
    [
        ({"global_batch_size": 64}, 8192, 2048),
        ({"global_batch_size": 256}, 16_384, 8192),
        ({"global_batch_size": 4096}, 16_384, 131_072),  # all
        ({}, 4096, None),
        ({"global_batch_size": 64, "num_prototypes": 7}, 7, 2048),
        ({"global_batch_size": 64, "num_prototypes": 9999}, 9999, 2048),
        ({"global_batch_size": 64, "gradient_prototypes": 9}, 8192, 9),
        ({"global_batch_size": 64, "gradient": "union"}, 8192, 2048),
        ({"global_batch_size": 64, "gradient": "detached"}, 8192, None),
        ({"global_batch_size": 64, "refresh": "restart"}, 2048, None),
    ],
)
def test_the_pool_follows_the_batch_unless_it_is_given(settings, size, newest):
    loss = create_loss(
        "neuclip", embed_dim=4, steps_per_epoch=3, gamma=0.5, gamma_decay_epochs=2.0, **settings
    )
    network = loss.normalizer.settings
    assert loss.normalizer.ring.size == size
    assert network.gradient_prototypes == newest
    assert network.inner_steps == 0


def test_what_is_kept_of_a_run_says_how_large_its_network_is():
    run = Run(4, 3, global_batch_size=64)
    kept = resolve(NeuCLIPSettings(), run)
    assert isinstance(kept, NeuCLIPSettings)
    assert (kept.num_prototypes, kept.gradient_prototypes) == (8192, 2048)
    assert resolve(kept, Run(4, 3, global_batch_size=7)) == kept
    assert resolve(OpenCLIPSettings(), run) == OpenCLIPSettings()
    assert resolve(OpenCLIPSettings(), run, kept) == OpenCLIPSettings()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (40, 24)),
        ({"rho": 5.0}, (40, 24)),
        ({"num_prototypes": 50}, (50, 24)),
        ({"gradient_prototypes": 9}, (40, 9)),
        ({"gradient": "union"}, (40, 2048)),
        ({"gradient": "detached"}, (40, None)),
        ({"refresh": "restart"}, (40, None)),
    ],
)
def test_a_continued_run_keeps_the_numbers_it_was_made_with(asked, expected):
    before = NeuCLIPSettings(num_prototypes=40, gradient_prototypes=24)
    run = Run(4, 3, global_batch_size=64)
    settings = resolve(NeuCLIPSettings(**asked), run, before)
    assert isinstance(settings, NeuCLIPSettings)
    assert (settings.num_prototypes, settings.gradient_prototypes) == expected
    assert settings.rho == asked.get("rho", before.rho)
    assert resolve(NeuCLIPSettings(), run, OpenCLIPSettings()) == resolve(NeuCLIPSettings(), run)
