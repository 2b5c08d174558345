"""Which embeddings the prototypes and the pool hold after each step."""

from dataclasses import replace

import pytest
import torch
from naive_reference import pairs


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def prototypes_of(loss) -> torch.Tensor:
    normalizer = loss.normalizer
    return getattr(normalizer, "prototypes", normalizer.ring.slots)


def run(build, steps: int, batch: int, name: str = "neuclip", **settings):
    """Steps through distinct batches without inner steps.

    Returns:
        The loss, all embeddings in the order met (texts, images), and after each step the
        number of the embedding each prototype holds.
    """
    everything = pairs(steps * batch, seed=5)
    network = {} if name == "neuclip_pool" else {"inner_steps": 0}
    loss = build(name, **network, **settings)
    held = []
    for step in range(steps):
        image, text = everything[:, step * batch : (step + 1) * batch]
        loss(image, text, scalar(10.0))
        prototypes = prototypes_of(loss)
        prototypes = prototypes[:, prototypes[0].norm(dim=-1) > 0.5]  # without empty slots
        numbers = [
            torch.cdist(prototypes[side], everything[1 - side]).argmin(1).tolist()
            for side in (0, 1)
        ]
        assert numbers[0] == numbers[1]
        exact = everything[1, numbers[0]]
        torch.testing.assert_close(prototypes[0], exact)
        held.append(numbers[0])
    return loss, everything, held


def test_restart_takes_the_newest_earlier_embeddings(build):
    _, _, held = run(build, 8, batch=6, num_prototypes=4, restart_steps=3)
    first = [4, 5, 2, 3]  # the last four of the batch, each in its slot of the ring
    assert [sorted(each) for each in held[:3]] == [sorted(first)] * 3
    # At step 3 those of step 2 (embeddings 12 to 17): never the batch being read.
    assert [sorted(each) for each in held[3:6]] == [[14, 15, 16, 17]] * 3
    assert [sorted(each) for each in held[6:]] == [[32, 33, 34, 35]] * 2


def test_embeddings_repeat_until_the_ring_is_full(build):
    _, _, held = run(build, 5, batch=4, num_prototypes=10, restart_steps=100)
    repeated = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert held[0] == held[1] == repeated
    # The ring is full after the third batch: one extra restart, 10 and 11 wrap around.
    assert held[2] == held[4] == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_restart_before_the_ring_is_full_repeats_its_embeddings(build):
    _, _, held = run(build, 3, batch=4, num_prototypes=20, restart_steps=2)
    assert held[2] == [k % 8 for k in range(20)]


@pytest.mark.parametrize("size", [4, 10, 12])
def test_the_pool_holds_the_newest(build, size):
    _, _, held = run(build, 6, batch=4, name="neuclip_pool", pool_size=size)
    for step, numbers in enumerate(held):
        seen = 4 * (step + 1)
        assert sorted(numbers) == list(range(max(seen - size, 0), seen))


def test_a_pool_that_fills_predicts_as_a_smaller_full_one(build):
    """Slots that are still empty have no part in the sum."""
    settings = {"gamma": 0.0, "gamma_schedule": "constant", "gamma_decay_epochs": 1.0}
    filling = build("neuclip_pool", pool_size=50, gradient_size=6, steps_per_epoch=1, **settings)
    full = build("neuclip_pool", pool_size=8, gradient_size=6, steps_per_epoch=1, **settings)
    for number in range(3):  # the third batch meets the 8 embeddings of the first two
        leaves = [pairs(4, seed=number).requires_grad_() for _ in range(2)]
        values = [
            loss(*leaf, scalar(10.0)) for loss, leaf in zip((filling, full), leaves, strict=True)
        ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(
        *(torch.autograd.grad(v, leaf)[0] for v, leaf in zip(values, leaves, strict=True))
    )
    image, text = pairs(5, seed=9)
    filling, full = build("neuclip_pool", pool_size=50), build("neuclip_pool", pool_size=4)
    for loss in (filling, full):
        assert torch.equal(
            loss.predict_log_normalizers(image, text, scalar(10.0)),
            build("rgcl_batch").predict_log_normalizers(image, text, scalar(10.0)),
        )  # no batch was seen: the batch's own estimate
        loss(*pairs(4, seed=0), scalar(10.0))
    torch.testing.assert_close(
        *(loss.predict_log_normalizers(image, text, scalar(10.0)) for loss in (filling, full))
    )


@pytest.mark.parametrize(("size", "period"), [(8, 4), (10, 3), (5, 7), (12, 1)])
def test_rolling_renews_every_prototype_once_per_period(build, size, period):
    settings = {"num_prototypes": size, "refresh": "rolling", "restart_steps": period}
    _, _, held = run(build, 4 * period + 6, batch=4, **settings)
    full = -(-size // 4)
    for step in range(full + 1, len(held)):
        changed = sum(a != b for a, b in zip(held[step], held[step - 1], strict=True))
        assert changed <= -(-size // period)
        # Nothing is older than a period and the ring's own age.
        oldest = 4 * (step - period) - size - 4
        assert min(held[step]) >= oldest


def test_rolling_does_not_take_empty_slots(build):
    settings = {"num_prototypes": 40, "refresh": "rolling", "restart_steps": 2}
    loss, _, _ = run(build, 4, batch=4, **settings)
    assert (loss.normalizer.prototypes.norm(dim=-1) > 0.9).all()


def test_the_current_batch_is_not_in_the_pool(build):
    """An anchor's positive in the pool would keep alpha above -log(m)."""
    loss = build("neuclip_pool", pool_size=4, epsilon=0.0)
    scale = scalar(100.0)
    for step in range(3):
        image, text = pairs(4, seed=step, noise=0.05)
        loss(image, text, scale)
        metrics = loss.metrics()
    assert metrics["predicted_log_normalizer"] < -20
    # Afterwards it is: a later batch is to meet it.
    after = loss.predict_log_normalizers(image, text, scale)
    assert float(after[0].min()) > -torch.log(scalar(4.0)) - 1


@pytest.mark.parametrize("kind", ["adagrad_norm", "adagrad", "adam"])
def test_the_optimizer_forgets_what_was_replaced(build, kind):
    settings = {"num_prototypes": 8, "refresh": "rolling", "restart_steps": 2}
    loss = build("neuclip", inner_steps=2, prototype_optimizer=kind, **settings)
    normalizer = loss.normalizer
    for step in range(3):
        loss(*pairs(4, seed=step), scalar(10.0))
    before = normalizer.optimizer.accumulator.clone()
    normalizer.settings = replace(normalizer.settings, inner_steps=0)
    loss(*pairs(4, seed=3), scalar(10.0))  # replaces the second half, and trains none
    after = normalizer.optimizer.accumulator
    if kind == "adagrad_norm":
        torch.testing.assert_close(after, 0.5 * before)
    else:
        assert (after[:, 4:] == 0).all()
        assert torch.equal(after[:, :4], before[:, :4])
        assert (after[:, :4] > 0).any()
