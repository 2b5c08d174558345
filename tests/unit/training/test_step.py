"""One step: non-finite numbers never reach the weights, and the host never waits."""

import math
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from neuclip.catalogue.registry import METHODS
from neuclip.method import inputs
from neuclip.method.losses import pair_loss
from neuclip.method.sample_table import SampleTable
from neuclip.training.loss_scale import INITIAL, LossScale
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from step_parts import CPU, Bench, batch, split


def step_of(bench: Bench) -> TrainingStep:
    return TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)


def with_adamw(method: str, **settings) -> Bench:
    """A bench with AdamW."""
    bench = Bench.of(method, **settings)
    optimizer = Optimizer(bench.towers, bench.optimizer._settings, 10)
    optimizer.set_rates(0)
    return replace(bench, optimizer=optimizer)


def numbers(bench: Bench) -> dict[str, torch.Tensor]:
    both = {**bench.towers.state_dict(), **bench.loss.state_dict(prefix="loss.")}
    return {name: value.clone() for name, value in both.items() if torch.is_tensor(value)}


def spoiled(size: int, row: int = 7):
    """Micro-batches with one non-finite image."""
    whole = batch(1)
    whole.images[row, 0, 0, 0] = math.inf
    return split(whole, size)


# --- non-finite numbers


@pytest.mark.parametrize("size", [12, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_a_non_finite_image_changes_no_weight(method, size):
    bench = with_adamw(method, noisy=False)
    step = step_of(bench)
    step(split(batch(0), size))
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    result = step(spoiled(size))
    status = result.readback.read()
    assert status.loss_rejected
    assert status.problem == "image_features: 1 of 12 rows are not finite, the first is row 7"
    assert math.isnan(float(result.loss))
    for name, value in bench.towers.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in numbers(bench).items():
        unseen = value.isneginf() & name.endswith("table.values")
        assert (torch.isfinite(value) | unseen).all(), name
    again = step(split(batch(2), size)).readback.read()
    assert again.problem is None
    assert not torch.equal(bench.towers.head.weight, before["head.weight"])


def test_a_non_finite_gradient_is_reported(monkeypatch):
    bench = with_adamw("openclip", noisy=False)
    before = numbers(bench)
    bench.towers.head.weight.register_hook(lambda grad: grad * math.inf)
    status = step_of(bench)(split(batch(0), 12)).readback.read()
    assert not status.loss_rejected
    assert status.problem.startswith("the gradient norm is ")
    assert all(torch.equal(value, before[name]) for name, value in numbers(bench).items())


def test_a_step_with_a_non_finite_hard_negative_changes_no_weight():
    bench = with_adamw("sogclr", noisy=False)
    step = step_of(bench)
    step([batch(0, options=True)])
    with torch.no_grad():
        bench.towers.words.weight[45] = math.inf  # a token of hard negatives alone
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    result = step([batch(1, options=True)])
    assert result.readback.read().loss_rejected
    for name, value in bench.towers.state_dict().items():
        assert torch.equal(value, before[name]), name
    table = bench.loss.normalizer.table.values
    assert (torch.isfinite(table) | table.isneginf()).all()


def test_a_non_finite_loss_is_reported():
    bench = with_adamw("openclip", noisy=False)
    bench.loss.register_forward_hook(lambda module, inputs, loss: loss * math.inf)
    assert step_of(bench)(split(batch(0), 12)).readback.read().problem == "the loss is inf"


def test_the_status_of_a_good_step():
    bench = with_adamw("neuclip")
    result = step_of(bench)(split(batch(0), 12), stop_asked=True)
    status = result.readback.read()
    assert (status.loss_rejected, status.stop, status.problem) == (False, True, None)
    assert status.loss == pytest.approx(float(result.loss))
    assert status.gradient_norm == pytest.approx(float(result.gradient_norm))
    assert status.temperature == pytest.approx(math.exp(-2))


def with_loss_scale(method: str, **more: object) -> Bench:
    """A bench with AdamW and a scaled loss; `more`: settings of the method."""
    bench = with_adamw(method, more=more, noisy=False)
    optimizer = Optimizer(bench.towers, bench.optimizer._settings, 10, LossScale(CPU))
    optimizer.set_rates(0)
    return replace(bench, optimizer=optimizer)


@pytest.mark.parametrize("size", [12, 4])
def test_an_overflow_is_skipped_and_halves_the_scale_but_is_no_problem(size):
    bench = with_loss_scale("openclip")
    before, step = numbers(bench), step_of(bench)
    spoil = bench.towers.head.weight.register_hook(lambda grad: grad * math.inf)
    status = step(split(batch(0), size)).readback.read()
    assert (status.overflow, status.problem, status.loss_scale) == (True, None, INITIAL)
    assert all(torch.equal(value, before[name]) for name, value in numbers(bench).items())
    bench.optimizer.loss_scale.scale.fill_(1)  # a smaller scale could not help
    status = step(split(batch(0), size)).readback.read()
    assert (status.overflow, status.loss_scale) == (False, 1)
    assert status.problem.startswith("the gradient norm is ")
    spoil.remove()
    status = step(split(batch(0), size)).readback.read()
    assert (status.overflow, status.problem) == (False, None)
    assert not torch.equal(bench.towers.head.weight, before["head.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_scale_changes_nothing_in_exact_arithmetic(method):
    """Neither the towers nor what the loss trains itself sees the scale."""
    after = []
    for bench in (with_adamw(method, noisy=False), with_loss_scale(method)):
        step = step_of(bench)
        for number in range(3):
            assert step(split(batch(number), 12)).readback.read().problem is None
        after.append(numbers(bench))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


# --- waiting for the device


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would make the host wait for a CUDA device.

    It replaces `torch.cuda.set_sync_debug_mode("error")` on a CPU. Reading a tensor's value
    (`item`, `bool`, `float`) dispatches `_local_scalar_dense`; value-dependent shapes dispatch
    `nonzero` and similar, or indexing by a mask; a tensor built from Python numbers dispatches
    `lift_fresh`, whose copy to a device waits too. `NoReading` covers the rest.
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
    """Refuses the methods that return a tensor's values; see `NoWaiting`."""

    REFUSED = frozenset({"tolist", "numpy", "cpu"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.REFUSED:
            raise AssertionError(f"{func.__name__} waits for the device")
        if func is torch.Tensor.__setitem__ and isinstance(args[2], int | float):
            # A fill on CUDA; only the CPU builds a tensor first.
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


GLOFND = {"glofnd_alpha": 0.3, "glofnd_start": 0.5}
NEVER_WAIT = [(name, {}) for name in METHODS]
NEVER_WAIT += [("openclip", GLOFND), ("neuclip_pool", GLOFND)]


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("method", "more"), NEVER_WAIT)
def test_the_host_never_waits_in_a_step(method, more, options, monkeypatch):
    # These read values, on CUDA at the first call only.
    monkeypatch.setattr(pair_loss, "check_values", lambda *_: None)
    monkeypatch.setattr(inputs, "check_rows", lambda *_, **__: None)
    monkeypatch.setattr(inputs, "check_weights", lambda *_: None)
    monkeypatch.setattr(SampleTable, "check", lambda *_: None)
    bench = with_loss_scale(method, **more)
    step = step_of(bench)
    batches = [split(batch(number, options=options), 12) for number in range(7)]
    for number in range(4):  # past the first restarts and epochs
        step(batches[number])
    with NoWaiting(), NoReading():
        results = [step(batches[number]) for number in (4, 5)]
        bench.optimizer.set_rates(5)
        step(split(batches[6][0], 6))
        with step.settling():
            step(batches[6])
    assert not any(result.readback.read().problem for result in results)
