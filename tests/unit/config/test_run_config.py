"""The settings tree: merging, checks over several fields, resolving, and YAML."""

import dataclasses
import os

import pytest
import yaml
from pydantic import ValidationError

from neuclip.catalogue import registry
from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.recipes import merge, read_yaml
from neuclip.config.resolve import ResolvedConfig, resolve, smoke
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError


def run(**tree) -> RunConfig:
    return validate(tree, "here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"false_negatives": "mask"},
            "--false-negatives mask needs a method whose loss takes",
        ),
        (
            {"pair_weight_key": "w"},
            "--pair-weight-key needs a method whose loss takes",
        ),
        ({"hard_negative_key": "n"}, "--hard-negative-key needs .* takes negative_features"),
    ],
)
def test_a_method_that_does_not_take_what_batches_bring_is_refused(data, message, monkeypatch):
    run(data=data, method={"name": "siglip"}).check()
    bare = dataclasses.replace(registry.METHODS["siglip"], takes=frozenset())
    monkeypatch.setitem(registry._table, "siglip", bare)
    with pytest.raises(UserError, match=message + ".*These do: openclip, infonce_queue"):
        run(data=data, method={"name": "siglip"}).check()


def test_later_value_wins_and_the_rest_stays():
    below = {"optim": {"lr": 1, "wd": 2}, "name": "a"}
    assert merge(below, {"optim": {"lr": 3}, "seed": 4}) == {
        "optim": {"lr": 3, "wd": 2},
        "name": "a",
        "seed": 4,
    }
    assert below == {"optim": {"lr": 1, "wd": 2}, "name": "a"}


def test_method_of_another_name_replaces_the_section():
    below = {"method": {"name": "neuclip", "rho": 9}}
    assert merge(below, {"method": {"name": "openclip"}}) == {"method": {"name": "openclip"}}
    assert merge(below, {"method": {"gamma": 1}})["method"] == {
        "name": "neuclip",
        "rho": 9,
        "gamma": 1,
    }


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_learning_rate_is_a_positive_number(value):
    with pytest.raises(ValidationError):
        OptimConfig(lr=value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"lr": 1e-3, "lr_min": 1e-2}}, "lr_min 0.01 is above lr 0.001"),
        ({"optim": {"lr_tau_scheduler": "step_thresh"}}, "step_thresh needs lr_tau"),
        ({"optim": {"epochs": 2, "stop_epochs": 3}}, "beyond the schedule of 2 epochs"),
        ({"name": ""}, "cannot be a folder's name"),
        ({"name": ".."}, "cannot be a folder's name"),
        ({"name": "a/b"}, "cannot be a folder's name"),
    ],
)
def test_check_refuses(tree, message):
    config = run(**tree)
    with pytest.raises(UserError, match=message):
        config.check()


@pytest.mark.parametrize(
    ("model", "beta2", "eps"),
    [("ViT-B-32", 0.98, 1e-6), ("RN50", 0.999, 1e-8), ("glyph-tiny", 0.999, 1e-8)],
)
def test_resolved_adam_follows_the_model(model, beta2, eps):
    optim = resolve(run(model={"name": model}), 1).optim
    assert (optim.beta2, optim.eps) == (beta2, eps)
    kept = resolve(run(model={"name": model}, optim={"beta2": 0.5, "eps": 0.1}), 1).optim
    assert (kept.beta2, kept.eps) == (0.5, 0.1)


def test_resolved_gamma_follows_the_length_of_the_run():
    def resolved(name, epochs):
        config = run(method={"name": name}, optim={"epochs": epochs})
        return resolve(config, 1).method.model_dump()

    method = resolved("fastclip_v3", 24)
    assert method["gamma"] == pytest.approx(0.415, abs=1e-3)
    assert method["gamma_decay_epochs"] == 24.0
    assert resolved("fastclip_v3", 4)["gamma"] == 1.0
    assert resolved("neuclip", 4)["gamma"] == 1.0
    assert resolved("neuclip_pool", 4)["gamma"] == resolved("neuclip_pool", 24)["gamma"] == 0.4


def test_resolving_leaves_no_default_open():
    once = resolve(RunConfig(), 2)
    assert type(once) is ResolvedConfig
    assert (once.data.batch_size, once.data.global_batch_size) == (64, 128)
    assert once.method.model_dump()["pool_size"] == 16_384
    assert resolve(once, 2) == once


def test_smoke_keeps_the_schedules_of_the_full_run():
    full = run(method={"name": "fastclip_v3"}, optim={"epochs": 24}, model={"name": "ViT-B-32"})
    small = smoke(full)
    assert (small.optim.epochs, small.optim.beta2) == (2, 0.98)
    assert small.method.model_dump()["gamma_decay_epochs"] == 24.0


def test_yaml_names_the_method_first_and_reads_back():
    config = run(method={"name": "rgcl_batch", "rho": 1e-14}, name="no")
    text = config.to_yaml()
    assert text.index("name: rgcl_batch") == text.index("method:\n  ") + len("method:\n  ")
    assert validate(yaml.safe_load(text), "text") == config


def test_floats_without_a_point_are_numbers():
    """PyYAML reads 5e-4 as a string."""
    assert run(optim={"lr": "5e-4"}).optim.lr == 5e-4


def test_validate_tells_every_problem_with_its_source():
    with pytest.raises(UserError) as caught:
        run(optim={"lr": -1, "lrr": 2}, nome="x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("here: ") for line in lines)


def test_read_yaml_of_nothing_is_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# only a comment\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "is not YAML"), (b"\xff\xfe\x00", "is not YAML"), (b"- a", "expected sections")],
)
def test_read_yaml_refuses(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_read_yaml_of_no_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("method", ["neuclip_pool", "fastclip_v3"])
def test_after_a_warm_start_gamma_is_final_unless_a_schedule_is_given(method):
    warm = {"optim": {"warm_start_steps": 5, "epochs": 20}}
    assert resolve(run(**warm, method={"name": method}), 1).method.gamma_schedule == "final"
    given = {"name": method, "gamma_schedule": "cosine"}
    assert resolve(run(**warm, method=given), 1).method.gamma_schedule == "cosine"
    assert resolve(run(method={"name": method}), 1).method.gamma_schedule == "cosine"
    words = resolve(run(**warm, method={"name": method, "gamma": 0.3}), 1).method.gamma_text(64)
    assert words == "0.3 from the first step"


def test_rho_auto_needs_a_warm_start():
    measured = {"method": {"name": "neuclip_pool", "rho": "auto"}}
    with pytest.raises(UserError, match="add --warm-start-steps 50"):
        run(**measured).check()
    warm = run(**measured, optim={"warm_start_steps": 2})
    warm.check()
    assert validate(yaml.safe_load(warm.to_yaml()), "here").method.rho == "auto"
    for value, words in ((-1, "must be >= 0"), ("some", "must be a number or auto")):
        with pytest.raises(UserError, match=words):
            run(method={"name": "neuclip_pool", "rho": value})


def test_read_yaml_of_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read_yaml(tmp_path / "a.yaml")
