"""Schedules of the learning rate, against open_clip's."""

import math
from types import SimpleNamespace

import pytest
import torch
from open_clip_train import scheduler

from neuclip.config.optimizer_section import OptimConfig
from neuclip.training.learning_rate import Schedule, temperature_rate

LR, WARMUP, EPOCHS, STEPS_PER_EPOCH = 3e-4, 7, 5, 13
TOTAL = EPOCHS * STEPS_PER_EPOCH


def of_towers(**values):
    settings = OptimConfig(lr=LR, warmup=WARMUP, epochs=EPOCHS, **values)
    settings.check()
    return Schedule.of_towers(settings, TOTAL)


@pytest.mark.parametrize(
    ("values", "theirs"),
    [
        ({}, lambda o: scheduler.cosine_lr(o, LR, WARMUP, TOTAL)),
        ({"lr_scheduler": "const"}, lambda o: scheduler.const_lr(o, LR, WARMUP, TOTAL)),
        (
            {"lr_scheduler": "const-cooldown", "epochs_cooldown": 2},
            lambda o: scheduler.const_lr_cooldown(o, LR, WARMUP, TOTAL, 2 * STEPS_PER_EPOCH),
        ),
        (
            {
                "lr_scheduler": "const-cooldown", "epochs_cooldown": 5,
                "lr_cooldown_end": 1e-5, "lr_cooldown_power": 2.0,
            },
            lambda o: scheduler.const_lr_cooldown(
                o, LR, WARMUP, TOTAL, 5 * STEPS_PER_EPOCH, 2.0, 1e-5
            ),
        ),
    ],
)  # fmt: skip
def test_every_step_has_open_clips_rate(values, theirs):
    optimizer = SimpleNamespace(param_groups=[{}])
    ours, theirs = of_towers(**values), theirs(optimizer)
    for step in range(TOTAL):
        assert ours.at(step) == pytest.approx(theirs(step), rel=1e-14), step
    assert ours.at(TOTAL + 9) == pytest.approx(ours.at(TOTAL))


def test_a_cooldown_ends_at_its_rate_and_begins_at_the_peak():
    ours = of_towers(lr_scheduler="const-cooldown", epochs_cooldown=1, lr_cooldown_end=1e-5)
    start = TOTAL - STEPS_PER_EPOCH
    assert ours.at(start - 1) == ours.at(start) == pytest.approx(LR)
    assert ours.at(start + 1) < LR
    assert ours.at(TOTAL) == pytest.approx(1e-5)


def test_warmup_is_linear_and_the_cosine_ends_at_the_floor():
    schedule = Schedule(peak=1.0, floor=0.1, warmup=10, total=110, kind="cosine")
    assert [schedule.at(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for step in range(10, 110):
        expected = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert schedule.at(step) == pytest.approx(expected)
    assert schedule.at(110) == pytest.approx(0.1)
    assert schedule.at(1000) == pytest.approx(0.1)


def test_constant_schedule_stays_at_the_peak():
    schedule = Schedule(peak=0.5, floor=0.0, warmup=2, total=10, kind="const")
    assert [schedule.at(s) for s in (0, 1, 2, 9)] == [0.25, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "temperature", "expected"),
    [
        ({}, 0.05, 2e-4),
        ({"lr_tau": 1e-3, "lr_tau_scheduler": "const"}, 0.01, 1e-3),
        ({"lr_tau": 1e-3, "lr_tau_scheduler": "same"}, 0.01, 1e-3 * 2e-4 / 5e-4),
        ({"lr_tau": 3e-3, "lr_tau_scheduler": "step_thresh"}, 0.031, 3e-3),
        ({"lr_tau": 3e-3, "lr_tau_scheduler": "step_thresh"}, 0.0299, 1e-3),
    ],
)
def test_temperature_rate(values, temperature, expected):
    scale = torch.tensor(-math.log(temperature), dtype=torch.float64)
    rate = temperature_rate(OptimConfig(**values), 2e-4, scale)
    assert float(rate) == pytest.approx(expected)
