"""Trains with the steps of published code and with this package's losses, side by side.

    python benchmarks/published_steps.py

Each published step below is written from its formulas, in linear space and with a B x B matrix. It
shares nothing with the package. Both sides train the same embeddings and temperature for 72 steps
in float64, with AdamW and the same batches: 12 epochs of 6 batches of 8 pairs. The benchmark prints
how far the embeddings, the temperature and the state per sample are apart at the end: for steps
that both compute (`EQUAL`), and for forms that differ (`DEPARTURES`, see docs/differences.md). It
writes benchmarks/results/published_steps.json. `tests/numerics/test_published_steps.py` holds the
first kind to 1e-6.
"""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from recorded import RESULTS, save
from torch import Tensor
from torch.nn import functional

from neuclip import create_loss
from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.registry import method_settings
from neuclip.method.choices import AdamRates

FORMAT = 1
SAMPLES, BATCH, DIM, STEPS = 48, 8, 12, 72
PER_EPOCH = SAMPLES // BATCH
RATES = AdamRates(0.9, 0.98, 1e-6)
LR, LR_TEMPERATURE = 5e-3, 5e-3
UNSEEN = 1e-35
"""The published moving averages take a smaller value for a sample that was never met."""


def margins(anchors: Tensor, candidates: Tensor) -> Tensor:
    """[B, B]: s_ij - s_ii."""
    return anchors @ candidates.T - (anchors * candidates).sum(-1, keepdim=True)


def others(count: int) -> Tensor:
    """[B, B]: 1 for j != i."""
    return 1 - torch.eye(count, dtype=torch.float64)


def float32(value: float) -> float:
    """The value as both sides keep individual temperatures."""
    return float(torch.tensor(value, dtype=torch.float32))


class PublishedStep(ABC):
    """The loss of published code for one batch, and its state."""

    @abstractmethod
    def loss(self, features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """The number whose gradient the code takes.

        Args:
            features: images and texts, [2, B, dim].
            scale: 1 / tau.
            ids: the samples of the batch.
            epoch: from 0.
        """

    def state(self) -> dict[str, Tensor]:
        """The numbers per sample, [2, samples], by name."""
        return {}


@dataclass
class FastCLIP(PublishedStep):
    """FastCLIP-v0, v1 and v3: fast_clip/loss.py of Optimization-AI/fast_clip.

    Attributes:
        gamma: its final value.
        decay: epochs of its cosine.
        rho: none: no factor tau (v0, v1).
        epsilon: added to u in the gradient's denominator.
    """

    gamma: float
    decay: float
    rho: float | None = None
    epsilon: float = 1e-14
    averages: Tensor = field(default_factory=lambda: torch.zeros(2, SAMPLES, dtype=torch.float64))

    def rate(self, epoch: int) -> float:
        """Gamma of an epoch."""
        if epoch == 0:
            return 1.0
        if epoch >= self.decay:
            return self.gamma
        return 0.5 * (1 + math.cos(math.pi * epoch / self.decay)) * (1 - self.gamma) + self.gamma

    def loss(self, features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Local anchors against constant candidates, then the reverse."""
        count, constant = len(ids), features.detach()
        gamma, mask = self.rate(epoch), others(len(ids))
        total = torch.zeros((), dtype=torch.float64)
        logs = torch.zeros((), dtype=torch.float64)
        for side in (0, 1):
            own = (features[0] * features[1]).sum(-1, keepdim=True)
            as_anchor = (features[side] @ constant[1 - side].T - own) * scale
            first = (as_anchor.exp() * mask).sum(-1) / (count - 1)
            old = self.averages[side, ids]
            average = (1 - gamma) * old + gamma * first.detach()
            if gamma < 1:
                average = torch.where(old < UNSEEN, first.detach(), average)
            self.averages[side, ids] = average
            as_candidate = (constant[side] @ features[1 - side].T - own.detach()) * scale
            second = (as_candidate.exp() * mask).sum(-1) / (count - 1)
            total = total + ((first + second) / (average + self.epsilon)).mean()
            logs = logs + average.log().mean()
        if self.rho is None:
            return total / 2
        return total / 2 / scale.detach() + self.rho / scale + logs / 2 / scale

    def state(self) -> dict[str, Tensor]:
        """The moving averages."""
        return {"average": self.averages}


@dataclass
class FastCLIPv2(FastCLIP):
    """FastCLIP-v2 since its commit c3ae1f5, with averages kept relative to a running bound.

    Attributes:
        initial: temperatures at the start.
        lr: their learning rate.
        regulariser: its rho.
        rooted: whether a step divides by the root of the second moment; not before that commit.
    """

    initial: float = 0.03
    lr: float = 0.0133
    regulariser: float = 7.0
    rooted: bool = True

    def __post_init__(self) -> None:
        shape = (2, SAMPLES)
        self.temperatures = torch.full(shape, float32(self.initial), dtype=torch.float64)
        self.bounds, self.first, self.second = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(3)
        )

    def loss(self, features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """The two terms at the old temperatures; then a step of each temperature."""
        count, constant = len(ids), features.detach()
        gamma, mask = self.rate(epoch), others(len(ids))
        total = torch.zeros((), dtype=torch.float64)
        own = (features[0] * features[1]).sum(-1, keepdim=True)
        for side in (0, 1):
            tau = self.temperatures[side, ids, None]
            margin = (features[side] @ constant[1 - side].T - own) / tau
            old_bound = self.bounds[side, ids]
            bound = torch.maximum(old_bound, margin.detach().max(-1).values)
            terms = (margin - bound[:, None]).exp() * mask
            first = terms.sum(-1) / (count - 1)
            old = self.averages[side, ids]
            average = (1 - gamma) * old * (old_bound - bound).exp() + gamma * first.detach()
            if gamma < 1:
                average = torch.where(old < UNSEEN, first.detach(), average)
            self.averages[side, ids], self.bounds[side, ids] = average, bound
            reverse = (constant[side] @ features[1 - side].T - own.detach()) / tau
            second = ((reverse - bound[:, None]).exp() * mask).sum(-1) / (count - 1)
            total = total + ((first + second) / (average + self.epsilon)).mean()
            slope = (terms * margin).detach().sum(-1) / (average + self.epsilon) / (count - 1)
            gradient = (average + self.epsilon).log() + bound + self.regulariser - slope
            self._step(side, ids, gradient.clamp(-5, 5), epoch)
        return total / 2

    def _step(self, side: int, ids: Tensor, gradient: Tensor, epoch: int) -> None:
        beta1, beta2 = (RATES.beta1, RATES.beta2) if epoch > 0 else (0.0, 0.0)
        self.first[side, ids] = beta1 * self.first[side, ids] + (1 - beta1) * gradient
        self.second[side, ids] = beta2 * self.second[side, ids] + (1 - beta2) * gradient**2
        mean = self.first[side, ids] / (1 - beta1 ** (epoch + 1))
        square = self.second[side, ids] / (1 - beta2 ** (epoch + 1))
        move = mean / ((square.sqrt() if self.rooted else square) + RATES.eps)
        moved = self.temperatures[side, ids] - self.lr * move
        self.temperatures[side, ids] = moved.clamp(0.01, 1)

    def state(self) -> dict[str, Tensor]:
        """The moving averages without their bounds, and the temperatures."""
        return {"average": self.averages * self.bounds.exp(), "temperature": self.temperatures}


@dataclass
class DRRho(PublishedStep):
    """The global loss of DRRho-CLIP's code, with SCENT's patch; no reference model.

    Attributes:
        gamma: FastCLIP's rate, or SCENT's c.
        rho: regulariser of the temperature.
        epsilon: inside the logarithm.
        scent: whether each anchor has a rate of its own.
    """

    gamma: float
    rho: float
    epsilon: float
    scent: bool
    logs: Tensor = field(default_factory=lambda: torch.zeros(2, SAMPLES, dtype=torch.float64))

    def loss(self, features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """One term, both of whose features have a gradient."""
        count, mask = len(ids), others(len(ids))
        setting = 1.0 if epoch == 0 else self.gamma
        total = torch.zeros((), dtype=torch.float64)
        logs = torch.zeros((), dtype=torch.float64)
        for side in (0, 1):
            margin = margins(features[side], features[1 - side]) * scale
            terms = margin.detach().exp() * mask
            fresh = self.epsilon + terms.sum(-1) / count
            old = self.logs[side, ids]
            rate = torch.full_like(old, setting)
            if self.scent:
                rate = 1 / (1 + torch.exp(-old - setting))
            mixed = ((1 - rate) * old.exp() + rate * fresh).log()
            new = torch.where(old == 0, fresh.log(), mixed)
            self.logs[side, ids] = new
            weights = terms / new.exp()[:, None]
            total = total + (margin * weights).sum(-1).mean() / (count - 1)
            logs = logs + new.mean()
        return total / scale.detach() + self.rho / scale + logs / 2 / scale

    def state(self) -> dict[str, Tensor]:
        """The moving averages, with epsilon."""
        return {"average": self.logs.exp()}


@dataclass
class LibAUC(PublishedStep):
    """SogCLR and iSogCLR of LibAUC's `GCLoss_v2`.

    Attributes:
        gamma: weight of the batch estimate.
        initial: temperatures at the start.
        learns: whether they are learned (iSogCLR).
        rho: their regulariser.
        summed: whether the loss is a sum over the negatives, as in the code, or their mean.
    """

    gamma: float
    initial: float
    learns: bool
    rho: float = 6.0
    summed: bool = False

    def __post_init__(self) -> None:
        start = float32(self.initial) if self.learns else self.initial
        self.temperatures = torch.full((2, SAMPLES), start, dtype=torch.float64)
        self.averages, self.momentum, self.bounds = (
            torch.zeros(2, SAMPLES, dtype=torch.float64) for _ in range(3)
        )

    def loss(self, features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """The mean of the two sides; first visits are known by batches."""
        count, mask = len(ids), others(len(ids))
        total = torch.zeros((), dtype=torch.float64)
        for side in (0, 1):
            tau = self.temperatures[side, ids, None]
            margin = margins(features[side], features[1 - side])
            scaled = (margin / tau).detach()
            old_bound = self.bounds[side, ids]
            bound = torch.maximum(old_bound, scaled.max(-1).values)
            terms = (scaled - bound[:, None]).exp() * mask
            fresh = terms.sum(-1) / (count - 1)
            old = self.averages[side, ids]
            kept = (1 - self.gamma) * old * (old_bound - bound).exp()
            average = fresh if old.sum() == 0 else kept + self.gamma * fresh
            average = average.clamp_min(1e-20)
            self.averages[side, ids], self.bounds[side, ids] = average, bound
            weights = terms / average[:, None]
            total = total + (weights * margin).sum(-1).mean()
            if self.learns:
                slope = (weights * scaled).sum(-1) / (count - 1)
                gradient = average.log() + self.rho + bound - slope
                self.momentum[side, ids] = 0.1 * self.momentum[side, ids] + 0.9 * gradient
                moved = self.temperatures[side, ids] - 0.01 * self.momentum[side, ids]
                self.temperatures[side, ids] = moved.clamp(0.005, 0.05)
        return total / 2 if self.summed else total / 2 / (count - 1)

    def state(self) -> dict[str, Tensor]:
        """The moving averages without their bounds, and the temperatures of iSogCLR."""
        averages = {"average": self.averages * self.bounds.exp()}
        return averages | ({"temperature": self.temperatures} if self.learns else {})


@dataclass(frozen=True)
class Result:
    """What is left of a run.

    Attributes:
        embeddings: [2, samples, dim].
        temperature: tau.
        state: numbers per sample, [2, samples], by name.
    """

    embeddings: Tensor
    temperature: float
    state: dict[str, Tensor]

    def apart_from(self, other: "Result") -> dict[str, float]:
        """The largest differences: of the embeddings absolute, of all else relative."""
        found = {"embeddings": float((self.embeddings - other.embeddings).abs().max())}
        found["temperature"] = abs(self.temperature / other.temperature - 1)
        for name, value in self.state.items():
            ratio = value / other.state[name] - 1
            found[f"{name} per sample"] = float(ratio.abs().max())
        return found


def train(
    loss: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    state: Callable[[], dict[str, Tensor]],
    *,
    noise: float = 0.6,
    temperature: float = 0.07,
) -> Result:
    """Trains a table of embeddings and a temperature.

    Args:
        loss: of features, scale, ids and epoch.
        state: the numbers per sample.
        noise: how far images and texts of a pair are apart at first.
        temperature: at the start.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    table = (normal(1, SAMPLES, DIM) + noise * normal(2, SAMPLES, DIM)).requires_grad_()
    logarithm = torch.tensor(-math.log(temperature), dtype=torch.float64).requires_grad_()
    groups = [{"params": [table]}, {"params": [logarithm], "lr": LR_TEMPERATURE}]
    rates = {"betas": (RATES.beta1, RATES.beta2), "eps": RATES.eps}
    adam = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, **rates)
    order = torch.arange(SAMPLES)
    for step in range(STEPS):
        epoch, within = divmod(step, PER_EPOCH)
        if within == 0:
            order = torch.randperm(SAMPLES, generator=generator)
        ids = order[within * BATCH :][:BATCH]
        features = functional.normalize(table[:, ids], dim=-1)
        adam.zero_grad()
        loss(features, logarithm.exp(), ids, epoch).backward()
        adam.step()
        with torch.no_grad():
            logarithm.clamp_(0, math.log(100))
    end = functional.normalize(table.detach(), dim=-1)
    tau = float((-logarithm.detach()).exp())
    return Result(end, tau, {k: v.clone() for k, v in state().items()})


@dataclass(frozen=True)
class Comparison:
    """A method of this package beside a published step.

    Attributes:
        published: makes the step.
        method: the name here.
        settings: those that differ from the defaults.
        epsilon_in_state: whether the published averages contain epsilon.
    """

    published: Callable[[], PublishedStep]
    method: str
    settings: dict[str, Any]
    epsilon_in_state: bool = False

    def apart(self, **world: float) -> dict[str, float]:
        """The largest differences after training both; `world`: see `train`."""
        step = self.published()
        run = RunFacts(DIM, PER_EPOCH, SAMPLES, BATCH, adam=RATES)
        loss = build_loss(method_settings(self.method, self.settings), run).double()

        def theirs(features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
            scale = scale if loss.learns_temperature else scale.detach()
            return step.loss(features, scale, ids, epoch)

        def ours(features: Tensor, scale: Tensor, ids: Tensor, epoch: int) -> Tensor:
            return loss(features[0], features[1], scale, sample_ids=ids)

        def state() -> dict[str, Tensor]:
            averages = loss.normalizer.table.values.exp()
            if self.epsilon_in_state:
                averages = averages + loss.epsilon
            found = {"average": averages}
            if hasattr(loss, "temperature"):
                found["temperature"] = loss.temperature.table.values[:2]
            return found

        return train(ours, state, **world).apart_from(train(theirs, step.state, **world))


MIXING: dict[str, Any] = {"gamma": 0.2, "gamma_decay_epochs": 8.0}
DOUBLED: dict[str, Any] = {"temperature_gradient": "fastclip"}
SCENT: dict[str, Any] = {"rho": 4.0, "epsilon": 1e-6, "objective_scale": "drrho", **DOUBLED}
EQUAL: dict[str, Comparison] = {
    "FastCLIP-v0": Comparison(lambda: FastCLIP(0.2, 8), "fastclip_v0", {**MIXING, **DOUBLED}),
    "FastCLIP-v1": Comparison(lambda: FastCLIP(0.2, 8), "fastclip_v1", MIXING),
    "FastCLIP-v2": Comparison(
        lambda: FastCLIPv2(0.2, 8, initial=0.07, regulariser=2.0),
        "fastclip_v2",
        {**MIXING, **DOUBLED, "temperature": 0.07, "rho": 2.0},
    ),
    "FastCLIP-v3": Comparison(
        lambda: FastCLIP(0.2, 8, rho=4.0), "fastclip_v3", {**MIXING, **DOUBLED, "rho": 4.0}
    ),
    "FastCLIP in DRRho-CLIP's code": Comparison(
        lambda: DRRho(0.3, 4.0, 1e-6, scent=False),
        "fastclip_v3",
        {"gamma": 0.3, "gamma_schedule": "constant", **SCENT},
        epsilon_in_state=True,
    ),
    "SCENT": Comparison(
        lambda: DRRho(2.0, 4.0, 1e-6, scent=True),
        "scent",
        {"rate_offset": 2.0, "first_rate_offset": 1.0, **SCENT},
        epsilon_in_state=True,
    ),
    "SogCLR, divided by B - 1": Comparison(
        lambda: LibAUC(0.9, 0.07, learns=False), "sogclr", {"temperature": 0.07, "epsilon": 0.0}
    ),
    "iSogCLR, divided by B - 1": Comparison(
        lambda: LibAUC(0.9, 0.05, learns=True, rho=2.0),
        "isogclr",
        {"temperature": 0.05, "rho": 2.0, "epsilon": 0.0},
    ),
}
"""Published steps that this package computes too."""

V3: dict[str, Any] = {**MIXING, "rho": 4.0}
DEPARTURES: dict[str, Comparison] = {
    "log(eps + u) for log u in FastCLIP-v3's temperature, eps 1e-6": Comparison(
        lambda: FastCLIP(0.2, 8, rho=4.0, epsilon=1e-6),
        "fastclip_v3",
        {**V3, **DOUBLED, "epsilon": 1e-6},
    ),
    "the same, eps 1e-14": EQUAL["FastCLIP-v3"],
    "temperature_gradient exact": Comparison(
        lambda: FastCLIP(0.2, 8, rho=4.0), "fastclip_v3", {**V3, "temperature_gradient": "exact"}
    ),
    "FastCLIP-v2 before its commit c3ae1f5: no root": replace(
        EQUAL["FastCLIP-v2"],
        published=lambda: FastCLIPv2(0.2, 8, initial=0.07, regulariser=2.0, rooted=False),
    ),
    "FastCLIP-v2 with temperature_gradient exact": replace(
        EQUAL["FastCLIP-v2"],
        settings={**EQUAL["FastCLIP-v2"].settings, "temperature_gradient": "exact"},
    ),
    "SCENT with objective_scale fastclip": replace(
        EQUAL["SCENT"], settings={**EQUAL["SCENT"].settings, "objective_scale": "fastclip"}
    ),
    "SCENT without first_rate_offset": replace(
        EQUAL["SCENT"], settings={**EQUAL["SCENT"].settings, "first_rate_offset": None}
    ),
    "SogCLR as a sum over negatives": replace(
        EQUAL["SogCLR, divided by B - 1"],
        published=lambda: LibAUC(0.9, 0.07, learns=False, summed=True),
    ),
}
"""Steps that this package takes in another form, by intent or by a setting."""


def first_update_by_scale(model: str, batch: int) -> float:
    """How far `objective_scale` changes AdamW's first update of fresh towers, relative to its norm.

    The first update of a weight is grad / (|grad| + eps): a factor on the gradient changes it where
    the gradient is not far above eps.
    """
    import open_clip  # only here: the tests import this file

    torch.manual_seed(0)
    towers = open_clip.create_model(model)
    size = open_clip.get_model_config(model)["vision_cfg"]["image_size"]
    images = torch.randn(batch, 3, size, size)
    tokens = torch.randint(1, 40_000, (batch, 77))
    updates = []
    for scale in ("fastclip", "drrho"):
        settings = {"rho": 11.0, "epsilon": 1e-6, "objective_scale": scale, **DOUBLED}
        loss = create_loss("rgcl_batch", embed_dim=512, **settings)
        towers.zero_grad()
        image, text, logit_scale = towers(images, tokens)
        loss(image, text, logit_scale).backward()
        grads = [weight.grad for weight in towers.parameters() if weight.grad is not None]
        updates.append(torch.cat([(g / (g.abs() + RATES.eps)).flatten() for g in grads]))
    return float((updates[1] - updates[0]).norm() / updates[0].norm())


def main() -> None:
    """Trains every pair, prints the differences and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="towers for the first update")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    found = {
        kind: {name: comparison.apart() for name, comparison in comparisons.items()}
        for kind, comparisons in (("equal", EQUAL), ("departures", DEPARTURES))
    }
    for kind, rows in found.items():
        print(f"\n{kind}, after {STEPS} steps")
        for name, apart in rows.items():
            print(f"  {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    changed = first_update_by_scale(args.model, args.batch_size)
    print(f"\nfirst update of {args.model} (batch {args.batch_size}) by scale: {changed:.1%}")
    towers = {"model": args.model, "batch": args.batch_size, "first_update_by_scale": changed}
    content = {"steps": STEPS, **found, "towers": towers}
    save(RESULTS / "published_steps.json", FORMAT, torch.device("cpu"), content)


if __name__ == "__main__":
    main()
