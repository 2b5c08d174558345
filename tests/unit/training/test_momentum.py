"""Momentum towers: keys of an average of the weights, encoded before the step."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from neuclip.catalogue.registry import METHODS
from neuclip.training.momentum import MomentumTowers
from neuclip.training.step import TrainingStep
from step_parts import CPU, Bench, batch, split

MOMENTUM = 0.7


def bench_of(**towers: bool) -> Bench:
    return Bench.of("moco", {"key_momentum": MOMENTUM, "queue_size": 30}, **towers)


def step_of(bench: Bench) -> TrainingStep:
    return TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)


def test_three_steps_equal_the_formulas():
    """A second model, averaged and asked by hand, and cross-entropies over lists of keys."""
    bench = bench_of(noisy=False)
    momentum, model = copy.deepcopy(bench.towers), copy.deepcopy(bench.towers)
    step, queue, ids = step_of(bench), [], []
    for number in range(3):
        whole = batch(number)
        with torch.no_grad():
            for mean, weight in zip(momentum.parameters(), model.parameters(), strict=True):
                mean.copy_(MOMENTUM * mean + (1 - MOMENTUM) * weight)
        keys = {k: v.detach() for k, v in momentum(whole.images, whole.tokens).items()}
        sides = ("image_features", "text_features")
        found = model(whole.images, whole.tokens)
        losses = []
        for side, other in (sides, sides[::-1]):
            for i, sample in enumerate(whole.sample_ids.tolist()):
                columns = [keys[other][i]]
                columns += [keys[other][j] for j in range(12) if j != i]
                columns += [
                    row[other] for row, held in zip(queue, ids, strict=True) if held != sample
                ]
                logits = torch.stack(columns) @ found[side][i] * found["logit_scale"]
                losses.append(torch.logsumexp(logits, 0) - logits[0])
        expected = torch.stack(losses).mean()
        grads = torch.autograd.grad(expected, list(model.parameters()))
        torch.testing.assert_close(step([whole]).loss, expected.detach())
        with torch.no_grad():
            for weight, grad in zip(model.parameters(), grads, strict=True):
                weight -= 0.05 * grad
        for weight, other in zip(bench.towers.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight, other)
        queue = [*queue, *({s: keys[s][i] for s in sides} for i in range(12))][-30:]
        ids = [*ids, *whole.sample_ids.tolist()][-30:]


def test_keys_leave_the_towers_as_they_are_and_have_no_gradient():
    bench = bench_of()  # with BatchNorm, whose statistics a training pass updates
    momentum = MomentumTowers(bench.clip, MOMENTUM)
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    with torch.no_grad():
        bench.towers.head.weight += 1
    parts = split(batch(0), 5)
    keys = momentum.keys(lambda b: bench.towers(b.images, b.tokens), parts)
    assert keys.shape == (2, 12, 6)
    assert not keys.requires_grad
    torch.testing.assert_close(normalize(keys, dim=-1), keys)
    for name, value in bench.towers.state_dict().items():
        assert torch.equal(value, before[name] + (name == "head.weight")), name
    moved = momentum.average.state_dict()["head.weight"] - before["head.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - MOMENTUM))


def test_a_resumed_run_is_bit_identical():
    """Weights, average and queue are the whole state: no step counts."""
    whole = bench_of(noisy=False)
    step = step_of(whole)
    for number in range(3):
        step([batch(number)])
    resumed = bench_of(noisy=False)
    resumed.towers.load_state_dict(copy.deepcopy(whole.towers.state_dict()))
    resumed.loss.load_state_dict(copy.deepcopy(whole.loss.state_dict()))
    again = step_of(resumed)
    again.momentum.average.load_state_dict(copy.deepcopy(step.momentum.average.state_dict()))
    for number in range(3, 6):
        assert torch.equal(step([batch(number)]).loss, again([batch(number)]).loss)
    for name, value in step.momentum.average.state_dict().items():
        assert torch.equal(value, again.momentum.average.state_dict()[name]), name
    for name, value in whole.towers.state_dict().items():
        assert torch.equal(value, resumed.towers.state_dict()[name]), name


@pytest.mark.parametrize(("scale", "kept"), [(1500.0, 1000.0), (1.5, 2.0), (90.0, 90.0)])
def test_the_temperature_stays_within_the_published_bounds(scale, kept):
    bench = bench_of(noisy=False)
    with torch.no_grad():
        bench.towers.logit_scale.fill_(scale).log_()
    bench.towers.logit_scale.requires_grad_(False)
    bench.optimizer._named.pop("logit_scale")
    step_of(bench)([batch(0)])
    assert bench.towers.logit_scale.exp().item() == pytest.approx(kept)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "moco"])
def test_other_methods_have_none(method):
    assert step_of(Bench.of(method)).momentum is None
