"""Derived settings of fine-tuning, as a table of cases; what is given is never derived."""

import math

import pytest

from neuclip.config.derived import Derived, Facts, derive, in_short, kept
from neuclip.config.validation import validate
from neuclip.errors import UserError


def facts(**values):
    known = {
        "pairs": 10_000, "model": "ViT-B-16", "temperature": 0.01, "pairs_in_memory": 500,
        "processes": 1,
    }  # fmt: skip
    return Facts(**{**known, **values})


def settings(**tree):
    return validate({"derive": "finetune", **tree}, "here")


def found(config=None, **values):
    _, derived = derive(config or settings(), facts(**values))
    return {one.key: one.value for one in derived}


CASES = [
    # pairs, memory, processes: batch, epochs, lr, warm-up, warm start
    (1_000, 500, 1, 32, 20, 3.5e-6, 29, 58),
    (5_000, 500, 1, 128, 15, 7.1e-6, 28, 55),
    (10_000, 500, 1, 256, 10, 1e-5, 18, 37),
    (10_000, 100, 1, 64, 10, 5e-6, 74, 100),
    (10_000, 500, 4, 64, 10, 1e-5, 18, 37),
    (10_000, None, 1, 256, 10, 1e-5, 18, 37),
    (100_000, 70, 1, 64, 3, 5e-6, 223, 100),
    (2_000_000, 4_000, 1, 256, 1, 1e-5, 371, 100),
    (2_000_000, 4_000, 64, 256, 1, 3e-5, 6, 11),
    (50, 500, 1, 16, 20, 2.5e-6, 1, 10),
]


@pytest.mark.parametrize("case", CASES)
def test_batch_length_and_rates_follow_from_the_data(case):
    pairs, memory, processes, batch, epochs, lr, warmup, warm_start = case
    values = found(pairs=pairs, pairs_in_memory=memory, processes=processes)
    assert values["batch_size"] == batch
    assert values["epochs"] == epochs
    assert values["lr"] == pytest.approx(lr)
    assert values["warmup"] == warmup
    assert values["warm_start_steps"] == warm_start


@pytest.mark.parametrize("split", [{}, {"val_split": 0.05}, {"val_split": 0.5}])
def test_pairs_that_are_held_out_make_no_steps(split):
    _, derived = derive(settings(optim={"epochs": 3}, evaluation=split), facts(pairs=2_000))
    reasons = {one.key: one.reason for one in derived}
    steps, batch = (3 * 31, 32) if split.get("val_split") == 0.5 else (3 * 29, 64)
    assert {one.key: one.value for one in derived}["batch_size"] == batch
    assert reasons["batch_size"] == "at least 20 steps an epoch"
    assert reasons["warmup"] == f"5 % of {steps} steps"


def test_a_batch_that_is_given_sets_the_rate():
    config = settings(data={"batch_size": 1024})
    values = found(config, pairs=100_000)
    assert "batch_size" not in values
    assert values["lr"] == pytest.approx(2e-5)
    accumulated = settings(data={"global_batch_size": 512, "batch_size": 32})
    assert found(accumulated)["lr"] == pytest.approx(1e-5 * math.sqrt(2), rel=0.02)
    assert "batch_size" not in found(settings(data={"accum_freq": 4}))


GIVEN = {
    "model": {"name": "ViT-B-32"},
    "data": {"batch_size": 8, "aug_cfg": None},
    "optim": {"epochs": 3, "lr": 1e-4, "warmup": 0, "warm_start_steps": 0, "wd": 0.2},
    "method": {"name": "neuclip_pool", "temperature": 0.02, "rho": 6.5},
    "output": {"log_every_n_steps": 7},
}


def test_a_setting_that_is_given_is_never_derived():
    """Also if it is given the value that it has by default."""
    config = settings(**GIVEN)
    full, derived = derive(config, facts())
    assert {one.key for one in derived} <= {
        "val_split", "best_metric", "image_layer_decay", "text_layer_decay",
    }  # fmt: skip
    for section, values in GIVEN.items():
        for key, value in values.items():
            assert getattr(getattr(full, section), key) == value


@pytest.mark.parametrize(
    ("method", "temperature", "rho"),
    [
        ("neuclip_pool", 0.02, "auto"),
        ("neuclip", 0.02, "auto"),
        ("fastclip_v3", 0.02, "auto"),
        ("fastclip_v2", 0.02, None),
        ("openclip", 0.02, None),
        ("siglip", None, None),  # its own, with its bias
    ],
)
def test_the_temperature_is_kept(method, temperature, rho):
    values = found(settings(method={"name": method}), temperature=0.02)
    assert values.get("temperature") == temperature
    assert values.get("rho") == rho


@pytest.mark.parametrize("method", ["neuclip_pool", "fastclip_v2", "openclip"])
def test_the_temperature_is_not_below_the_methods_lowest(method):
    _, derived = derive(settings(method={"name": method}), facts(temperature=0.005))
    (one,) = [one for one in derived if one.key == "temperature"]
    assert (one.value, one.reason) == (0.01, "temperature_min")
    given = settings(method={"name": "neuclip_pool", "temperature_min": 0.004})
    assert found(given, temperature=0.005)["temperature"] == 0.005


def test_weights_without_a_temperature_leave_the_methods_own():
    assert "temperature" not in found(temperature=None)


def test_rho_is_measured_only_in_a_warm_start():
    assert "rho" not in found(settings(optim={"warm_start_steps": 0}))


def test_lora_takes_ten_times_the_rate_and_the_same_in_every_layer():
    plain, lora = found(), found(settings(adaptation={"lora_rank": 4}))
    assert lora["lr"] == pytest.approx(10 * plain["lr"])
    assert plain.keys() - lora.keys() == {"image_layer_decay", "text_layer_decay"}


def test_lion_moves_by_a_tenth_of_adamws_rate_with_the_same_decay_a_step():
    plain, lora = {}, {"lora_rank": 4}
    for adaptation in (plain, lora):
        adamw = found(settings(adaptation=adaptation))
        _, derived = derive(settings(optim={"opt": "lion"}, adaptation=adaptation), facts())
        lion = {one.key: one.value for one in derived}
        assert lion["lr"] == pytest.approx(adamw["lr"] / 10)
        assert lion["lr"] * lion["wd"] == pytest.approx(adamw["lr"] * adamw["wd"])
        reasons = {one.key: one.reason for one in derived}
        assert reasons["lr"].endswith("; over 10 for Lion")
        assert reasons["wd"].endswith("; times 10 for Lion, whose rate is smaller")


@pytest.mark.parametrize(
    ("given", "missing"),
    [({}, "--lr and --wd;"), ({"lr": 0.1}, "--wd;"), ({"wd": 0.0}, "--lr;")],
)
def test_an_optimiser_without_a_known_rate_needs_rate_and_decay(given, missing):
    with pytest.raises(UserError, match=f"--opt sgd: give {missing} .* for adamw and lion alone"):
        found(settings(optim={"opt": "sgd", **given}))
    values = found(settings(optim={"opt": "sgd", "lr": 0.1, "wd": 0.0}))
    assert not {"lr", "wd"} & values.keys()


@pytest.mark.parametrize(
    ("evaluation", "metric"),
    [
        ({}, "val/mean_recall@1"),  # of the share that is held out
        ({"val_data": "a.csv"}, "auto"),
        ({"imagenet_val": "folder"}, "auto"),
        ({"val_data": "a.csv", "val_split": 0.1}, "val/mean_recall@1"),
        ({"val_data": "a.csv", "val_frequency": 0}, None),
        ({"imagenet_val": "folder", "zeroshot_frequency": 0}, None),
    ],
)
def test_the_best_epoch_is_kept_whatever_validation_data_there_are(evaluation, metric):
    assert found(settings(evaluation=evaluation)).get("best_metric") == metric


def test_early_stop_may_follow_a_metric_that_is_derived():
    config = settings(evaluation={"early_stop": 2}, data={"train_data": "pairs.csv"})
    config.check()
    derive(config, facts())[0].check()
    with pytest.raises(UserError, match="--early-stop 2 needs a metric"):
        derive(config, facts(pairs=30))[0].check()  # too few to hold some out


def test_early_layers_move_less_unless_their_tower_is_locked():
    assert found()["image_layer_decay"] == found()["text_layer_decay"] == 0.75
    assert "image_layer_decay" not in found(settings(model={"lock_image": True}))


def test_a_model_that_is_known_is_not_derived():
    assert found()["name"] == "ViT-B-16"
    assert "name" not in found(model=None)


def test_what_is_derived_is_complete_valid_and_says_why():
    full, derived = derive(settings(), facts())
    full.check()
    assert full.derive is None
    assert full.method.method == "neuclip_pool"
    again = validate({**full.model_dump(), "method": full.method.model_dump()}, "again")
    assert again == full
    assert all(one.reason for one in derived)
    reasons = {one.key: one.reason for one in derived}
    assert reasons["lr"] == "1e-05 at batch 256, by the root of the batch (256)"
    assert reasons["batch_size"] == "more is seldom better"
    _, by_memory = derive(settings(), facts(pairs_in_memory=40))
    assert next(d for d in by_memory if d.key == "batch_size").reason.startswith("what memory")


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        ({"pairs": 50}, {"epochs": "of 30 pairs, at most 20", "warm_start_steps": ", at least 10:",
                         "val_split": "given: 20 pairs at least"}),
        ({"pairs": 2_000_000, "processes": 64},
         {"lr": "batch (16384), at most 3e-05"}),
        ({"pairs": 100_000, "pairs_in_memory": 70}, {"warm_start_steps": "run, at most 100:"}),
    ],
)  # fmt: skip
def test_a_bound_that_decided_is_named(values, bounds):
    _, derived = derive(settings(), facts(**values))
    reasons = {one.key: one.reason for one in derived}
    assert all(words in reasons[key] for key, words in bounds.items())
    _, usual = derive(settings(), facts())
    assert not any("at least 1" in one.reason or "at most" in one.reason for one in usual)


def test_a_continued_run_keeps_what_it_recorded():
    before, _ = derive(settings(), facts())
    now = settings(optim={"epochs": 30})
    full = kept(now, before)
    assert full.derive is None
    assert full.optim.epochs == 30
    for section, key in (("optim", "lr"), ("data", "batch_size"), ("method", "rho")):
        assert getattr(getattr(full, section), key) == getattr(getattr(before, section), key)


def test_words_are_those_of_a_command_line():
    _, derived = derive(settings(), facts())
    words = {one.key: one.words for one in derived}
    assert words["aug_cfg"] == ["scale=(0.5, 1.0)"]
    assert words["lr"] == ["1e-05"]
    assert in_short([Derived("optim", "lr", 1e-5, "x"), Derived("optim", "wd", 0.1, "y")]) == (
        "lr 1e-05, wd 0.1"
    )
    assert in_short([Derived("model", "name", "ViT-B-32", "x")]) == "model ViT-B-32"
