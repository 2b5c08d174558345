"""Every reading of NeuCLIP, and the other one, against a plain version of the whole method."""

from dataclasses import dataclass, field

import pytest
import torch
from naive_reference import pairs, published_gamma
from torch import Tensor

BATCH, STEPS, PER_EPOCH, RATE = 4, 9, 3, 0.3
EPSILON, RHO = 1e-4, 2.0


def estimate(features: Tensor, scale: Tensor) -> Tensor:
    """The batch's g_i, [2, batch]."""
    own = (features[0] * features[1]).sum(-1, keepdim=True)
    ratios = ((features @ features.flip(0).transpose(1, 2) - own) * scale).exp()
    return (ratios.sum(-1) - 1) / (features.shape[1] - 1)


@dataclass
class PlainNeuCLIP:
    """NeuCLIP in linear space, with autograd for the prototypes; one attribute a reading."""

    size: int
    mixing: str = "gamma"
    prototype_optimizer: str = "adagrad_norm"
    restart_from: str = "earlier"
    restart_fill: str = "pool"
    restart_optimizer: bool = True
    temperature_gradient: str = "exact"
    restart_steps: int = 3
    seen: list[Tensor] = field(default_factory=list)
    step: int = 0
    was_full: bool = False

    def candidates(self) -> Tensor:
        """All embeddings met so far, [2, count, dim]: texts, images."""
        return torch.cat(self.seen, 1).flip(0)

    def recent(self) -> Tensor:
        """m embeddings: the newest, or all there are, in turn."""
        met = self.candidates()
        if met.shape[1] >= self.size:
            return met[:, -self.size :]
        return met[:, [k % met.shape[1] for k in range(self.size)]]

    def restart(self) -> None:
        """All prototypes anew."""
        self.prototypes = self.recent().clone()
        self.forget()

    def forget(self) -> None:
        """Resets AdaGrad's sums."""
        if self.restart_optimizer or not self.step:
            each = self.prototype_optimizer == "adagrad"
            self.sums = torch.zeros_like(self.prototypes if each else self.prototypes[:, :1, :1])

    def meet(self, batch: Tensor) -> None:
        """Remembers a batch; the pool's first completion restarts."""
        self.seen.append(batch)
        full = self.candidates().shape[1] >= self.size
        if full and not self.was_full and self.restart_fill == "pool" and len(self.seen) > 1:
            self.restart()
        self.was_full = full

    def refresh(self) -> None:
        """The restarts of a step."""
        due = self.step % self.restart_steps == 0
        if self.step == 0 or (due and self.restart_fill == "pool"):
            self.restart()
        elif due:
            count = min(BATCH, self.size)
            first = self.step // self.restart_steps * count
            for k in range(count):
                newest = self.candidates()[:, k - count]
                self.prototypes[:, (first + k) % self.size] = newest
            self.forget()

    def predicted(self, features: Tensor, scale: Tensor, prototypes: Tensor) -> Tensor:
        """1/m sum_k exp((cos(e_i, W_k) - s_ii) / tau), [2, batch]."""
        own = (features[0] * features[1]).sum(-1)
        directions = prototypes / prototypes.norm(dim=-1, keepdim=True)
        cosines = torch.stack([features[side] @ directions[side].T for side in (0, 1)])
        return ((cosines - own[None, :, None]) * scale).exp().mean(-1)

    def train_prototypes(self, features: Tensor, scale: Tensor) -> None:
        """Two AdaGrad steps on the objective in its conjugate form, over tau."""
        target = EPSILON + estimate(features, scale)
        for _ in range(2):
            leaf = self.prototypes.clone().requires_grad_()
            alpha = (EPSILON + self.predicted(features, scale, leaf)).log()
            objective = ((-alpha).exp() * target + alpha - 1).mean(-1).sum() / scale
            (grad,) = torch.autograd.grad(objective, leaf)
            square = grad**2
            if self.prototype_optimizer == "adagrad_norm":
                square = square.sum((1, 2), keepdim=True)
            self.sums = self.sums + square
            self.prototypes = self.prototypes - RATE * grad / (self.sums.sqrt() + 1e-10)

    def gradients(self, features: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """One training step: the gradients by the features and by the scale."""
        at_once = self.step == 0 or self.restart_from == "current"
        if at_once:
            self.meet(features)
        self.refresh()
        self.train_prototypes(features, scale)
        gamma = published_gamma(self.step // PER_EPOCH, 0.3, 2.0, "cosine")
        if self.mixing == "none":
            gamma = 0.0
        predicted = self.predicted(features, scale, self.prototypes)
        normalizer = EPSILON + (1 - gamma) * predicted + gamma * estimate(features, scale)
        self.step += 1
        if not at_once:
            self.meet(features)
        leaf, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
        ratio = ((EPSILON + estimate(leaf, s)) / normalizer).mean()
        logs = normalizer.log().mean()
        if self.temperature_gradient == "exact":
            return torch.autograd.grad((ratio + logs - 1) / s + RHO / s, (leaf, s))
        # Twice through the ratio, whose factor tau is constant.
        published = ratio / scale + RHO / s + logs / s
        by_leaf, by_scale = torch.autograd.grad(published, (leaf, s), retain_graph=True)
        (again,) = torch.autograd.grad(ratio / scale, s)
        return by_leaf, by_scale + again


READINGS = {
    "defaults": {},
    "no mixing": {"mixing": "none"},
    "AdaGrad by coordinate": {"prototype_optimizer": "adagrad"},
    "current batch": {"restart_from": "current"},
    "optimizer kept": {"restart_optimizer": False},
    "batch fill": {"restart_fill": "batch"},
    "batch fill from the current batch": {"restart_fill": "batch", "restart_from": "current"},
    "doubled temperature gradient": {"temperature_gradient": "fastclip"},
}


@pytest.mark.parametrize(
    ("reading", "size"),
    [*((reading, 10) for reading in READINGS), ("defaults", BATCH), ("current batch", BATCH)],
)
def test_a_reading_equals_the_plain_method(build, reading, size):
    settings = READINGS[reading]
    loss = build(
        "neuclip", epsilon=EPSILON, rho=RHO, gamma=0.3, gamma_decay_epochs=2.0, num_prototypes=size,
        steps_per_epoch=PER_EPOCH, **settings,
    )  # fmt: skip
    plain = PlainNeuCLIP(size, **settings)
    for number in range(STEPS):
        features = pairs(BATCH, seed=number)
        scale = torch.tensor(6.0 + number, dtype=torch.float64)
        leaf, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
        got = torch.autograd.grad(loss(leaf[0], leaf[1], s), (leaf, s))
        for one, other in zip(got, plain.gradients(features, scale), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reading", [name for name in READINGS if name != "defaults"])
def test_a_reading_makes_a_difference(build, reading):
    """With m above the batch; so no comparison above can pass by an ignored setting."""
    ends = []
    for settings in ({}, READINGS[reading]):
        loss = build("neuclip", epsilon=EPSILON, num_prototypes=10, gamma=0.3, **settings)
        for number in range(STEPS):
            leaf = pairs(BATCH, seed=number).requires_grad_()
            s = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
            value = loss(leaf[0], leaf[1], s)
        ends.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, (leaf, s))]))
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4
