"""AmorLIP against plain modules, torch's Adam, and sums in linear space."""

import copy
import math

import pytest
import torch
from naive_reference import pairs
from torch import Tensor, nn
from torch.nn import functional

from neuclip.method.normalizers import amortized

C = 0.01


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class PlainNet(nn.Module):
    """One side's MLP from ordinary layers."""

    def __init__(self, stacked, side: int) -> None:
        super().__init__()
        hidden, dim = stacked.hidden_weight.shape[1:]
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.out = (
            nn.LayerNorm(hidden),
            nn.LayerNorm(dim),
            nn.Linear(dim, 1),
        )
        self.double()
        names = ("hidden_weight", "hidden_bias", "hidden_gain", "hidden_shift")
        names += ("back_weight", "back_bias", "back_gain", "back_shift", "out_weight", "out_bias")
        layers = (self.first, self.norm1, self.second, self.norm2, self.out)
        targets = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        with torch.no_grad():
            for name, target in zip(names, targets, strict=True):
                target.copy_(getattr(stacked, name)[side].reshape(target.shape))

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm2(functional.relu(self.second(self.norm1(functional.relu(self.first(x))))))
        return self.out(functional.relu(u + x)).squeeze(-1)


def partition(features: Tensor, scale: Tensor) -> Tensor:
    """Z [2, count] in linear space."""
    weights = torch.ones(features.shape[1], features.shape[1]).double().fill_diagonal_(C)
    ratios = torch.exp(scale * (features @ features.flip(0).transpose(1, 2)))
    return (ratios * weights).sum(-1)


def fit(kind: str, z: Tensor, features: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """The amortisation objective, z = log lambda [2, count], target in linear space."""
    square = (z - target.log()).square().mean(1).sum()
    count = z.shape[1]
    if kind == "log_l2":
        return square
    if kind == "kl_div_asym":
        ratio = partition(features, scale) / z.exp()
        return 0.1 * square + (ratio * (target.log() - z)).sum() / count**2
    total = torch.zeros(()).double()
    for side in range(2):
        for i in range(count):
            for j in range(count):
                w = (C if i == j else 1.0) * torch.exp(
                    scale * features[side, i] @ features[1 - side, j]
                )
                p, q = w / z[side, i].exp(), w / target[side, i]
                m = (p + q) / 2
                total = total + 0.5 * (p * (p / m).log() + q * (q / m).log())
    return 0.1 * square + total / count**2


def answer(nets: nn.ModuleList, features: Tensor) -> Tensor:
    """log lambda [2, count]."""
    return torch.stack([net(side) for net, side in zip(nets, features, strict=True)])


@torch.no_grad()
def blend(ema: nn.Module, nets: nn.Module, rate: float) -> None:
    for kept, new in zip(ema.parameters(), nets.parameters(), strict=True):
        kept.copy_(rate * kept + (1 - rate) * new)


def ramp(epoch: int, top: float, length: float) -> float:
    return top * (1 - (1 + math.cos(math.pi * epoch / length)) / 2) if epoch < length else top


@pytest.mark.parametrize("kind", ["log_l2", "kl_div_asym", "js_div"])
@pytest.mark.parametrize("fit_previous", [True, False])
def test_amorlip_equals_the_recipe(build, kind, fit_previous, monkeypatch):
    """Several epochs: target, inner Adam, the normalizer used, EMA, restarts, loss, gradients."""
    monkeypatch.setattr(amortized, "ANCHORS_AT_ONCE", 2 if fit_previous else 5)  # of five
    per_epoch, top, length = 3, 0.8, 3.0
    loss = build(
        "amorlip",
        steps_per_epoch=per_epoch,
        positive_weight=C,
        amortization=kind,
        fit_previous=fit_previous,
        previous_weight=top,
        previous_epochs=length,
        restart_epochs=2,
        late_rho_epoch=2,
        inner_steps=2,
    )
    normalizer = loss.normalizer
    nets = ema = previous = adam = None
    for step in range(72 if kind == "log_l2" and fit_previous else 11):
        epoch, scale = step // per_epoch, scalar(6.0 + step % 11)
        features = pairs(5, seed=step)
        leaf, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
        value = loss(leaf[0], leaf[1], s)
        got = torch.autograd.grad(value, (leaf, s))
        if step % per_epoch == 0:
            previous = copy.deepcopy(ema)
            if epoch % 2 == 0:
                fresh = normalizer._fresh(epoch).double()
                nets = nn.ModuleList([PlainNet(fresh, side) for side in range(2)])
                ema = copy.deepcopy(nets)
                adam = torch.optim.Adam(nets.parameters(), lr=1e-3)
        z_batch, share = partition(features, scale), ramp(epoch, top, length)
        target = z_batch
        if fit_previous and share > 0:
            before = answer(previous, features).exp().detach()
            target = share * before + (1 - share) * z_batch
        used = target
        if not fit_previous:
            used = answer(ema, features).exp().detach()
        for _ in range(2):
            adam.zero_grad()
            fit(kind, answer(nets, features), features, scale, target).backward()
            nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
            adam.step()
        if step % per_epoch % 2 == 0:
            blend(ema, nets, 0.92 if fit_previous else share)
        same, t = features.clone().requires_grad_(), scale.clone().requires_grad_()
        positives = (same[0] * same[1]).sum(-1)
        ratios = (partition(same, t) / used).mean(1).sum()
        rho = 8.5 if epoch < 2 else -8.5
        expected = (-2 * t * positives.mean() + ratios) / t.detach() + rho / t
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
        for one, other in zip(got, torch.autograd.grad(expected, (same, t)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for side in range(2):
        predicted = normalizer.log_lambda(features)[side]
        torch.testing.assert_close(
            predicted, ema[side](features[side]).detach(), rtol=1e-5, atol=1e-6
        )


def test_the_network_has_the_published_size():
    from neuclip.method.normalizers.amortized import LambdaNetwork

    network = LambdaNetwork(512, 512, seed=0)
    assert sum(tensor.numel() for tensor in network.parameters()) == 2 * 527_873


def test_with_the_batch_and_full_positives_the_gradient_is_twice_clips(build):
    features, scale = pairs(6), scalar(10.0)
    grads = []
    for loss in (build("amorlip", positive_weight=1.0), build("openclip")):
        leaf = features.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(leaf[0], leaf[1], scale), leaf)[0])
    torch.testing.assert_close(grads[0] * scale, 2 * grads[1])


def test_a_fresh_network_ignores_the_global_random_state(build):
    torch.manual_seed(1)
    one = build("amorlip").state_dict()
    torch.manual_seed(2)
    other = build("amorlip").state_dict()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
