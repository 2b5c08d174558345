"""A step over micro-batches is the step over all of their pairs at once."""

import pytest
import torch
from torch import Tensor

from neuclip.catalogue.registry import METHODS
from neuclip.training.accumulation import RandomState
from neuclip.training.momentum import MomentumTowers
from neuclip.training.step import TrainingStep
from step_parts import CPU, Bench, batch, split


def steps_of(bench: Bench, size: int, count: int = 3) -> list[Tensor]:
    """Losses of some steps in micro-batches of a size."""
    step = TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)
    return [step(split(batch(number), size)).loss for number in range(count)]


def with_one_graph(bench: Bench, size: int, count: int = 3) -> list[Tensor]:
    """The same without a cache: the graphs of all micro-batches live until the backward pass."""
    losses = []
    momentum = MomentumTowers.of(bench.loss, bench.clip)
    for number in range(count):
        whole = batch(number)
        keys = {}
        if momentum is not None:
            parts = split(whole, size)
            keys["key_features"] = momentum.keys(lambda b: bench.towers(b.images, b.tokens), parts)
        encoded = [bench.towers(b.images, b.tokens) for b in split(whole, size)]
        outputs = {
            name: torch.cat([e[name] for e in encoded]) if "features" in name else value
            for name, value in encoded[0].items()
        }
        loss = bench.loss(**outputs, sample_ids=whole.sample_ids, **keys)
        loss.backward()
        bench.optimizer.step(torch.zeros(()))
        losses.append(loss.detach())
    return losses


def assert_equal_runs(one: Bench, other: Bench) -> None:
    """Gradients of every step, weights, running statistics, and the state of the loss."""
    assert len(one.optimizer.kept) == len(other.optimizer.kept) > 0
    for ours, theirs in zip(one.optimizer.kept, other.optimizer.kept, strict=True):
        assert ours.keys() == theirs.keys()
        for name, grad in ours.items():
            torch.testing.assert_close(grad, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
    for module in ("towers", "loss"):
        ours, theirs = getattr(one, module).state_dict(), getattr(other, module).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11, msg=name)
            else:
                assert value == theirs[name], name


@pytest.mark.parametrize("method", METHODS)
def test_with_dropout_the_gradient_is_that_of_one_graph(method):
    accumulated, whole = Bench.of(method), Bench.of(method)
    torch.manual_seed(5)
    losses = steps_of(accumulated, 4)
    random = torch.rand(3)
    torch.manual_seed(5)
    torch.testing.assert_close(losses, with_one_graph(whole, 4), rtol=1e-11, atol=1e-12)
    assert torch.equal(random, torch.rand(3))  # and the random numbers go on from the same place
    assert_equal_runs(accumulated, whole)
    assert accumulated.towers.norm.num_batches_tracked == 9
    assert accumulated.towers.norm.track_running_stats


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_the_split_does_not_matter(method):
    whole = Bench.of(method, noisy=False)
    losses = steps_of(whole, 12)
    for size in (6, 5):
        accumulated = Bench.of(method, noisy=False)
        torch.testing.assert_close(steps_of(accumulated, size), losses, rtol=1e-11, atol=1e-12)
        assert_equal_runs(accumulated, whole)


@pytest.mark.parametrize("method", ["openclip", "siglip", "isogclr", "neuclip_pool"])
def test_groups_weights_and_hard_negatives_are_those_of_the_batch_however_it_is_split(method):
    def losses_of(bench: Bench, size: int) -> list[Tensor]:
        step = TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)
        whole = [batch(number, options=True) for number in range(3)]
        return [step(split(each, size)).loss for each in whole]

    whole, plain = Bench.of(method, noisy=False), Bench.of(method, noisy=False)
    losses = losses_of(whole, 12)
    assert not any(map(torch.equal, losses, steps_of(plain, 12)))
    accumulated = Bench.of(method, noisy=False)
    torch.testing.assert_close(losses_of(accumulated, 5), losses, rtol=1e-11, atol=1e-12)
    assert_equal_runs(accumulated, whole)
    words = whole.optimizer.kept[0]["words.weight"]
    assert (words[40:].abs().sum(1) > 0).any()  # the hard negatives' tokens are trained


def test_a_locked_tower_gets_no_gradient():
    bench = Bench.of("neuclip")
    for parameter in (*bench.towers.patches.parameters(), *bench.towers.head.parameters()):
        parameter.requires_grad_(False)
    bench.towers.norm.requires_grad_(False).eval()
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    steps_of(bench, 4, count=1)
    changed = {
        name for name, value in bench.towers.state_dict().items() if (value != before[name]).any()
    }
    assert changed == {"words.weight", "text_head.weight", "text_head.bias", "logit_scale"}
    assert not bench.towers.norm.training


def test_random_numbers_of_the_loss_are_not_drawn_again():
    def draw(*_):
        torch.rand(7)

    following = []
    for steps in (steps_of, with_one_graph):
        bench = Bench.of("openclip")
        bench.loss.register_forward_hook(draw)
        torch.manual_seed(5)
        steps(bench, 4)
        following.append(torch.rand(3))
    assert torch.equal(*following)


def test_a_random_state_is_gone_back_to():
    state = RandomState.now(CPU)
    first = torch.rand(4)
    state.restore(CPU)
    assert torch.equal(first, torch.rand(4))


def test_the_generator_of_metal_is_restored_too(monkeypatch):
    """A machine without Metal, whose generator is scripted."""
    state, restored = torch.tensor([7], dtype=torch.uint8), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    RandomState.now(torch.device("mps")).restore(torch.device("mps"))
    assert restored == [state]
