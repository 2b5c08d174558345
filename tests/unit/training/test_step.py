"""One step: what is not finite never reaches the weights, and the host never waits in it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from neuclip.catalogue.registry import METHODS
from neuclip.method.losses import pair_loss
from neuclip.method.sample_table import SampleTable
from neuclip.training.nonfinite import Containment
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from step_parts import CPU, Bench, batch, split


def step_of(bench: Bench) -> TrainingStep:
    return TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)


def with_adamw(method: str, **settings) -> Bench:
    """A bench with the real optimiser."""
    bench = Bench.of(method, **settings)
    optimizer = Optimizer(bench.towers, bench.optimizer._settings, 10)
    optimizer.set_rates(0)
    return replace(bench, optimizer=optimizer)


def numbers(bench: Bench) -> dict[str, torch.Tensor]:
    both = {**bench.towers.state_dict(), **bench.loss.state_dict(prefix="loss.")}
    return {name: value.clone() for name, value in both.items() if torch.is_tensor(value)}


def spoiled(size: int, row: int = 7):
    """Micro-batches, with a picture that is not finite."""
    whole = batch(1)
    whole.images[row, 0, 0, 0] = math.inf
    return split(whole, size)


# --- what is not finite


@pytest.mark.parametrize("size", [12, 4])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_is_not_finite_is_kept(method, size):
    bench = with_adamw(method, noisy=False)
    step = step_of(bench)
    step(split(batch(0), size))
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    result = step(spoiled(size))
    verdict = result.readback.read()
    assert verdict.voted_down
    assert verdict.problem == "image_features: 1 of 12 rows are not finite, the first is row 7"
    assert math.isnan(float(result.loss))
    for name, value in bench.towers.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in numbers(bench).items():
        unseen = value.isneginf() & name.endswith("table.values")
        assert (torch.isfinite(value) | unseen).all(), name
    again = step(split(batch(2), size)).readback.read()
    assert again.problem is None
    assert not torch.equal(bench.towers.head.weight, before["head.weight"])


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    bench = with_adamw("openclip", noisy=False)
    before = numbers(bench)
    bench.towers.head.weight.register_hook(lambda grad: grad * math.inf)
    verdict = step_of(bench)(split(batch(0), 12)).readback.read()
    assert not verdict.voted_down
    assert verdict.problem.startswith("the gradient's norm is ")
    assert all(torch.equal(value, before[name]) for name, value in numbers(bench).items())


def test_a_loss_that_is_not_finite_is_named():
    bench = with_adamw("openclip", noisy=False)
    bench.loss.register_forward_hook(lambda module, inputs, loss: loss * math.inf)
    assert step_of(bench)(split(batch(0), 12)).readback.read().problem == "the loss is inf"


def test_a_good_step_says_what_it_came_to():
    bench = with_adamw("neuclip")
    result = step_of(bench)(split(batch(0), 12), stop_asked=True)
    verdict = result.readback.read()
    assert (verdict.voted_down, verdict.stop, verdict.problem) == (False, True, None)
    assert verdict.loss == pytest.approx(float(result.loss))
    assert verdict.gradient_norm == pytest.approx(float(result.gradient_norm))
    assert verdict.temperature == pytest.approx(math.exp(-2))


def test_finite_features_pass_containment_unchanged():
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    outputs = {"image_features": features, "text_features": features * 2}
    contained = Containment.of(outputs)
    assert all(torch.equal(contained.outputs[name], outputs[name]) for name in outputs)
    contained.outputs["text_features"].sum().backward()
    assert torch.equal(features.grad, torch.full_like(features, 2))
    assert contained.wrong.tolist() == [[0, 0], [0, 0]]
    assert not contained.any_wrong


# --- waiting for the device


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a CUDA device.

    Without one it stands for `torch.cuda.set_sync_debug_mode("error")`: a read of a tensor's value
    by Python (`item`, `bool`, `float`) is `_local_scalar_dense`; shapes that depend on values are
    `nonzero` and its kin, or indexing by a mask; a tensor made of Python's numbers is `lift_fresh`,
    whose copy to a device waits too. `NoReading` knows those that dispatch nothing on the CPU.
    """

    REFUSED = frozenset(
        {
            "_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "masked_select", "nonzero",
            "unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
        }
    )  # fmt: skip
    INDEXING = frozenset({"index", "index_put", "index_put_", "_unsafe_index"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"{name} waits for the device")
        if name in self.INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in {torch.bool, torch.uint8}]
            if masks:
                raise AssertionError(f"{name} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Refuses the methods that hand a tensor's values over; see `NoWaiting`."""

    REFUSED = frozenset({"tolist", "numpy", "cpu"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.REFUSED:
            raise AssertionError(f"{func.__name__} waits for the device")
        if func is torch.Tensor.__setitem__ and isinstance(args[2], int | float):
            # On CUDA a fill; only the CPU makes a tensor of the number first.
            return args[0][args[1]].fill_(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor(3.0) + x,
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.__setitem__(0, torch.tensor(1.0)),
    ],
)
def test_the_guard_refuses(read):
    x = torch.randn(3)
    with NoWaiting(), NoReading(), pytest.raises(AssertionError, match="waits for the device"):
        read(x)


@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_in_a_step(method, monkeypatch):
    # On CUDA these two read values at the first call only.
    monkeypatch.setattr(pair_loss, "check_values", lambda *_: None)
    monkeypatch.setattr(SampleTable, "check", lambda *_: None)
    bench = with_adamw(method, noisy=False)
    step = step_of(bench)
    batches = [split(batch(number), 12) for number in range(7)]
    for number in range(4):  # past the first restarts and epochs
        step(batches[number])
    with NoWaiting(), NoReading():
        results = [step(batches[number]) for number in (4, 5)]
        bench.optimizer.set_rates(5)
        step(split(batches[6][0], 6))
    assert not any(result.readback.read().problem for result in results)
