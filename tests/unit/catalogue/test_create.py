"""Losses by name, and what is said of names and settings that do not fit."""

import re

import numpy as np
import pytest

from neuclip import create_loss
from neuclip.catalogue.create import build_loss, check_arguments
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.neuclip import NeuCLIPPoolSettings
from neuclip.catalogue.openclip import OpenCLIPSettings
from neuclip.catalogue.registry import METHODS, method_settings
from neuclip.errors import UserError
from neuclip.method.losses.pair_loss import PairLoss

MIXING = [name for name, info in METHODS.items() if "gamma_schedule" in info.settings.model_fields]


def fitting(name: str) -> dict[str, float]:
    return {"gamma": 0.5, "gamma_decay_epochs": 2.0} if name in MIXING else {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_from_the_catalogue(name):
    loss = create_loss(name, embed_dim=4, steps_per_epoch=3, num_samples=10, **fitting(name))
    assert isinstance(loss, PairLoss)
    assert loss.needs_sample_ids == METHODS[name].needs_sample_ids
    same = build_loss(method_settings(name, fitting(name)), RunFacts(4, 3, num_samples=10))
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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"gamma_decay_epochs": 2.0}) for name in MIXING),
        ("amorlip", {"late_rho_epoch": 3}),
        ("amorlip", {"previous_epochs": 4.0, "restart_epochs": 2}),
    ],
)
def test_settings_in_epochs_ask_for_the_length_of_an_epoch(name, settings):
    given = ", ".join(f"{key}={value:g}" for key, value in settings.items())
    with pytest.raises(UserError, match=rf"{name}.*{given} counts epochs: pass steps_per_epoch="):
        create_loss(name, embed_dim=4, **settings)
    create_loss(name, embed_dim=4, steps_per_epoch=3, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("neuclp", {}, "unknown method 'neuclp'; did you mean 'neuclip'? known: amorlip, fastclip"),
        ("neuclip", {"num_prototype": 3}, "no setting 'num_prototype'; did you mean 'num_prototy"),
        (
            "openclip",
            {"rho": 3.0},
            "method 'openclip' has no setting 'rho'; known: glofnd_alpha, glofnd_lr",
        ),
        ("rgcl_batch", {"rho": -1.0}, "rho: Input should be greater than or equal to 0 (got -1.0)"),
        ("neuclip", {"refresh": "lifo"}, "refresh: Input should be 'restart' or 'rolling'"),
        ("sogclr", {"gamma": 0.0}, "gamma: Input should be greater than 0"),
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


NUMBERS = ["embed_dim", "total_steps", "steps_per_epoch", "num_samples", "global_batch_size"]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_are_none(key):
    known = {"embed_dim": 4, key: 0}
    with pytest.raises(UserError, match=f"{key} 0: must be at least 1"):
        create_loss("fastclip_v3", **known)
    for value in ("512", 5.0, True, [4]):
        message = re.escape(f"{key} {value!r}: must be a whole number, such as ")
        with pytest.raises(UserError, match=message):
            check_arguments("x", {**known, key: value})
    check_arguments("x", {**known, key: np.int64(7)})


def test_only_embed_dim_must_be_known():
    with pytest.raises(UserError, match="embed_dim None: must be a whole number, such as 512"):
        check_arguments("x", {"embed_dim": None})
    check_arguments("x", dict.fromkeys(NUMBERS) | {"embed_dim": 4})


def test_a_method_is_a_name():
    for name in (None, 3, ["openclip"]):
        with pytest.raises(UserError, match=r"unknown method .*known: amorlip, fastclip_v0"):
            check_arguments(name, {"embed_dim": 4})


def test_the_catalogue_says_what_the_settings_are():
    for info in METHODS.values():
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
        ({}, None, None),  # settled by the first batch
        ({"global_batch_size": 64, "pool_size": 7}, 7, 2048),
        ({"global_batch_size": 64, "pool_size": 9999}, 9999, 2048),
        ({"global_batch_size": 64, "gradient_size": 9}, 8192, 9),
        ({"global_batch_size": 64, "gradient": "union"}, 8192, 2048),
        ({"global_batch_size": 64, "gradient": "detached"}, 8192, None),
    ],
)
def test_the_pool_follows_the_batch_unless_its_size_is_given(settings, size, newest):
    loss = create_loss("neuclip_pool", embed_dim=4, **settings)
    assert loss.normalizer.settings.size == size
    chosen = {key: value for key, value in settings.items() if key != "global_batch_size"}
    asked = method_settings("neuclip_pool", chosen)
    kept = METHODS["neuclip_pool"].resolve(asked, settings.get("global_batch_size"), None)
    assert (kept.pool_size, kept.gradient_size) == (size, newest)


@pytest.mark.parametrize(
    ("numbers", "settings", "warm_up"),
    [
        ({}, {}, 1000),
        ({"total_steps": 20_000}, {}, 1000),
        ({"total_steps": 500}, {}, 50),
        ({"total_steps": 500}, {"queue_warm_up": 499}, 499),
        ({}, {"queue_warm_up": 0}, 0),
    ],
)
def test_the_warm_up_of_a_queue_leaves_steps_with_it(numbers, settings, warm_up):
    assert create_loss("infonce_queue", embed_dim=4, **numbers, **settings).warm_up == warm_up


def test_a_queue_that_no_step_would_read_is_refused():
    with pytest.raises(UserError, match=r"queue_warm_up 500 leaves no step of the run \(500"):
        create_loss("infonce_queue", embed_dim=4, total_steps=500, queue_warm_up=500)


@pytest.mark.parametrize(
    ("numbers", "settings", "start"),
    [
        ({}, {}, 15_000),
        ({"total_steps": 500, "steps_per_epoch": 50}, {}, 200),
        ({"steps_per_epoch": 50}, {"glofnd_start": 0.5}, 25),
    ],
)
@pytest.mark.parametrize("name", ["openclip", "neuclip_pool"])
def test_thresholds_start_after_a_share_of_the_run(name, numbers, settings, start):
    loss = create_loss(name, embed_dim=4, glofnd_alpha=0.01, **numbers, **settings)
    assert loss.thresholds.start == start
    assert loss.needs_sample_ids == (name == "openclip")
    asked = method_settings(name, {"glofnd_alpha": 0.01, **settings})
    assert asked.needs_sample_ids == loss.needs_sample_ids


def test_thresholds_that_no_step_would_use_are_refused():
    numbers = {"total_steps": 100, "steps_per_epoch": 50}
    with pytest.raises(UserError, match=r"glofnd_start 2 leaves no step of the run \(2 epochs\)"):
        create_loss("openclip", embed_dim=4, glofnd_alpha=0.01, glofnd_start=2.0, **numbers)


def test_thresholds_need_a_method_that_has_them():
    assert create_loss("openclip", embed_dim=4).thresholds is None
    for name in ("siglip", "amorlip", "neuclip"):
        with pytest.raises(UserError, match="has no setting 'glofnd_alpha'"):
            create_loss(name, embed_dim=4, glofnd_alpha=0.01)


@pytest.mark.parametrize("name", ["fastclip_v3", "infonce_queue"])
def test_settings_of_thresholds_are_idle_without_any(name):
    idle = method_settings(name, {}).idle()
    assert "glofnd_start" in idle
    assert ("glofnd_lr" in idle) == (name == "fastclip_v3")
    assert not method_settings(name, {"glofnd_alpha": 0.1}).idle()


def test_a_continued_run_keeps_the_size_of_its_queue():
    resolve = METHODS["infonce_queue"].resolve
    asked, before = (method_settings("infonce_queue", given) for given in ({}, {"queue_size": 40}))
    assert resolve(asked, 64, None).queue_size == 8192
    assert resolve(asked, 64, before).queue_size == 40
    assert resolve(before, 64, asked).queue_size == 40


def resolved(asked, batch, before=None):
    """Sizes of the pool that settings come to."""
    settings = METHODS["neuclip_pool"].resolve(NeuCLIPPoolSettings(**asked), batch, before)
    return settings.pool_size, settings.gradient_size


def test_resolved_sizes_do_not_follow_another_batch():
    assert resolved({}, 64) == (8192, 2048)
    assert resolved({"pool_size": 8192, "gradient_size": 2048}, 7) == (8192, 2048)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (40, 24)),
        ({"rho": 5.0}, (40, 24)),
        ({"pool_size": 50}, (50, 24)),
        ({"gradient_size": 9}, (40, 9)),
        ({"gradient": "union"}, (40, 2048)),
        ({"gradient": "detached"}, (40, None)),
    ],
)
def test_a_continued_run_keeps_the_sizes_it_was_made_with(asked, expected):
    before = NeuCLIPPoolSettings(pool_size=40, gradient_size=24)
    assert resolved(asked, 64, before) == expected
    assert resolved(asked, 64, OpenCLIPSettings()) == resolved(asked, 64)
