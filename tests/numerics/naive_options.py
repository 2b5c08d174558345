"""Every method with groups, pair weights and hard negatives: double loops, in linear space."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from naive_reference import published_gamma
from torch import Tensor

Values = list[list[Tensor | None]]
"""A number per side and anchor; none: the anchor has no negative."""


@dataclass(frozen=True)
class Step:
    """A global batch, as the loss is called with it.

    Attributes:
        features: [2, batch, dim].
        scale: 1 / temperature.
        bias: for the sigmoid loss.
        ids: of the pairs.
        groups: [batch, kinds]; 0: none.
        weights: of the pairs.
        hard: hard negatives, [batch, dim]; rows of zeros: none.
        bounds: by side and anchor, the largest similarity of a negative that counts.
    """

    features: Tensor
    scale: Tensor
    bias: Tensor
    ids: list[int]
    groups: list[list[int]] | None = None
    weights: list[float] | None = None
    hard: Tensor | None = None
    bounds: list[list[float]] | None = None

    def __len__(self) -> int:
        return self.features.shape[1]

    def related(self, i: int, j: int) -> bool:
        """Whether two pairs are not negatives of each other."""
        return self.groups is not None and share_a_group(self.groups[i], self.groups[j])

    def similarities(self, side: int, i: int) -> Tensor:
        """Those of an anchor to its negatives."""
        others = range(len(self))
        found = [self.features[1 - side, j] for j in others if j != i and not self.related(i, j)]
        found = [each for each in found if not self.above(side, i, each)]
        if side == 0 and self.hard is not None:
            found += [caption for caption in self.hard if caption.detach().any()]
        if not found:
            return self.features.new_empty(0)
        return torch.stack(found) @ self.features[side, i]

    def above(self, side: int, i: int, candidate: Tensor) -> bool:
        """Whether a candidate exceeds the anchor's bound."""
        if self.bounds is None:
            return False
        return float((candidate @ self.features[side, i]).detach()) > self.bounds[side][i]

    def positive(self, i: int) -> Tensor:
        return self.features[0, i] @ self.features[1, i]

    def inner(self, side: int, i: int, scale: Tensor) -> Tensor | None:
        """g of an anchor: the mean over its negatives."""
        found = torch.exp((self.similarities(side, i) - self.positive(i)) * scale)
        return found.mean() if len(found) else None

    def inners(self, scales: Tensor) -> Values:
        return [[self.inner(s, i, scales[s, i]) for i in range(len(self))] for s in (0, 1)]

    def mean(self, values: Values) -> Tensor:
        """Mean of the sides' means over anchors with a negative, by the pairs' weights."""
        sides = []
        for side in values:
            total, weight_sum = 0 * self.features.sum(), 0.0
            for i, value in enumerate(side):
                if value is not None:
                    weight = 1.0 if self.weights is None else self.weights[i]
                    total, weight_sum = total + weight * value, weight_sum + weight
            sides.append(total / weight_sum if weight_sum else total)
        return (sides[0] + sides[1]) / 2

    def surrogate(self, inners: Values, alpha: Values, epsilon: float) -> Values:
        return [
            [
                None if g is None else torch.exp(-alpha[s][i]) * (epsilon + g) + alpha[s][i] - 1
                for i, g in enumerate(side)
            ]
            for s, side in enumerate(inners)
        ]


def share_a_group(one: list[int], other: list[int]) -> bool:
    return any(a == b and a != 0 for a, b in zip(one, other, strict=True))


def constant(values: Values) -> Values:
    return [[None if v is None else v.detach() for v in side] for side in values]


@dataclass
class Memory:
    """What a naive method remembers between steps: u by side and id, or the pool, newest last."""

    table: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    pool: list[tuple[Tensor, int, list[int] | None]] = field(default_factory=list)
    thresholds: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)
    step: int = 0


def openclip(step: Step) -> Tensor:
    """Cross-entropy of each anchor over its positive and its negatives."""
    terms: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            margins = step.similarities(side, i) - step.positive(i)
            terms[side].append(torch.log1p(torch.exp(margins * step.scale).sum()))
    return step.mean(terms)


def siglip(step: Step) -> Tensor:
    """Every term counts for its two anchors, half each; hard negatives for their image alone."""
    weights = torch.tensor(step.weights or [1.0] * len(step), dtype=torch.float64)
    weights = weights / weights.sum()
    total = torch.zeros((), dtype=torch.float64)

    def term(similarity: Tensor, z: int) -> Tensor:
        return torch.log(1 + torch.exp(-z * (similarity * step.scale + step.bias)))

    image, text = step.features
    for i in range(len(step)):
        for j in range(len(step)):
            if i == j or not step.related(i, j):
                z = 1 if i == j else -1
                total = total + (weights[i] + weights[j]) / 2 * term(image[i] @ text[j], z)
        for caption in step.hard if step.hard is not None else ():
            if caption.detach().any():
                total = total + weights[i] * term(image[i] @ caption, -1)
    return total


def averages(
    step: Step, inners: Values, memory: Memory, rate: Callable[[Tensor], float | Tensor]
) -> Values:
    """u after the step; an anchor without a negative keeps its own. For new ids: g."""
    result: Values = [[], []]
    written = {}
    for side in (0, 1):
        for i, g in enumerate(inners[side]):
            before = memory.table.get((side, step.ids[i]))
            if g is None or before is None:
                value = before if g is None else g.detach()
            else:
                gamma = rate(before)
                value = (1 - gamma) * before + gamma * g.detach()
            result[side].append(value)
            if value is not None:
                written[side, step.ids[i]] = value
    memory.table |= written
    memory.step += 1
    return result


def log_plus(values: Values, epsilon: float) -> Values:
    return [[None if v is None else torch.log(v + epsilon) for v in side] for side in values]


def expand(scale: Tensor, step: Step) -> Tensor:
    return scale.expand(2, len(step))


def table_method(
    step: Step, memory: Memory, rate: Callable[[Tensor], float | Tensor], epsilon: float
) -> Tensor:
    """The mean of the surrogate."""
    inners = step.inners(expand(step.scale, step))
    alpha = log_plus(averages(step, inners, memory, rate), epsilon)
    return step.mean(step.surrogate(inners, alpha, epsilon))


def over_batch(step: Step, inners: Values) -> Values:
    """The estimates as means over the negatives and the positive, which counts as 0."""

    def share(side: int, i: int) -> float:
        count = len(step.similarities(side, i))
        return count / (count + 1)

    return [
        [None if g is None else g * share(s, i) for i, g in enumerate(side)]
        for s, side in enumerate(inners)
    ]


def predicted(
    step: Step, prototypes: list[Tensor], keep: Callable[[int, int], bool], count: int | None
) -> Values:
    """Means over the prototypes of each side that `keep` leaves; `count`: what they are over."""
    result: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            kept = [p[side] for k, p in enumerate(prototypes) if keep(i, k)]
            above = [p for p in kept if step.above(side, i, p)]
            kept = [p for p in kept if not step.above(side, i, p)]
            if not kept:
                result[side].append(None)
                continue
            vectors = torch.stack(kept)
            cosines = (vectors / vectors.norm(dim=1, keepdim=True)) @ step.features[side, i]
            terms = torch.exp((cosines - step.positive(i)) * step.scale)
            over = len(terms) if count is None else count - len(above)
            result[side].append(terms.sum() / over)
    return result


def pool_method(
    step: Step, memory: Memory, gamma: float, size: int, newest: int, epsilon: float
) -> Tensor:
    """The surrogate over tau with the pool's prediction; the batch then enters the pool."""
    inners = step.inners(expand(step.scale, step))
    pool = memory.pool
    alpha: Values = [[], []]

    def keep(i: int, k: int) -> bool:
        _, sample, groups = pool[k]
        if sample == step.ids[i]:
            return False
        return step.groups is None or groups is None or not share_a_group(step.groups[i], groups)

    count = len(pool) if step.groups is None else None
    found = predicted(step, [p for p, _, _ in pool], keep, count)
    for side in (0, 1):
        for i, g in enumerate(inners[side]):
            value = found[side][i]
            if g is None:
                alpha[side].append(None)
                continue
            if value is None:
                value = g.detach()
            else:
                value = _through_newest(step, pool, keep, (side, i), newest, value)
            alpha[side].append(torch.log(epsilon + (1 - gamma) * value + gamma * g.detach()))
    remember(step, memory, size)
    return step.mean(step.surrogate(inners, alpha, epsilon))


@dataclass(frozen=True)
class QueueForm:
    """How a queue takes part: the settings queue_size, queue_alignment and queue_positives."""

    size: int
    alignment: str
    positives: str


def followed(step: Step, memory: Memory, alignment: str) -> list[Tensor]:
    """The queue as a batch's anchors see it, [2, dim] each, texts first."""
    held = [embeddings for embeddings, _, _ in memory.pool]
    if alignment == "none" or not held:
        return held
    moved = [each.clone() for each in held]
    for side in (0, 1):
        for d in range(step.features.shape[-1]):
            there = [float(step.features[1 - side, j, d].detach()) for j in range(len(step))]
            here = [float(each[side, d]) for each in held]
            wanted, found = sum(there) / len(there), sum(here) / len(here)
            factor = 1.0
            if alignment == "moments":
                spread = sum((x - wanted) ** 2 for x in there) / len(there)
                present = sum((x - found) ** 2 for x in here) / len(here)
                factor = math.sqrt(spread / present)
            for each, x in zip(moved, here, strict=True):
                each[side, d] = wanted + factor * (x - found)
    return [each / each.norm(dim=-1, keepdim=True) for each in moved]


def queue_terms(
    step: Step, memory: Memory, form: QueueForm, side: int, i: int
) -> tuple[list[Tensor], int]:
    """exp((e_i . q - s_ii) / tau) of the queue that is left to an anchor; what a mean is over."""
    own, other = step.features[side, i], step.features[1 - side, i]
    positive = own @ (other.detach() if form.positives == "anchor" else other)
    found, left_out = [], 0
    held = followed(step, memory, form.alignment)
    for embeddings, (_, sample, groups) in zip(held, memory.pool, strict=True):
        grouped = groups is not None and share_a_group(step.groups[i], groups)
        if sample == step.ids[i] or grouped:
            left_out += step.groups is not None
        elif step.above(side, i, embeddings[side]):
            left_out += 1
        else:
            found.append(torch.exp((embeddings[side] @ own - positive) * step.scale))
    return found, len(held) - left_out


def queue_method(step: Step, memory: Memory, form: QueueForm, warm_up: int) -> Tensor:
    """Cross-entropy over the batch and the queue; the batch then enters the queue."""
    terms: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            margins = step.similarities(side, i) - step.positive(i)
            total = 1 + torch.exp(margins * step.scale).sum()
            if memory.step >= warm_up:
                total = total + sum(queue_terms(step, memory, form, side, i)[0])
            terms[side].append(torch.log(total))
    remember(step, memory, form.size)
    return step.mean(terms)


def mean_over_both(
    step: Step, memory: Memory, form: QueueForm, epsilon: float, *, over_batch: bool = False
) -> Tensor:
    """Log(eps + g), g the mean over batch and queue; anchors need a negative in the batch.

    Args:
        over_batch: of n negatives in the batch, the sum counts n / (n + 1) times.
    """
    terms: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            margins = step.similarities(side, i) - step.positive(i)
            n = len(margins)
            total = torch.exp(margins * step.scale).sum() * (n / (n + 1) if over_batch else 1)
            beside, count = queue_terms(step, memory, form, side, i)
            total = (total + sum(beside)) / max(n + count, 1)
            terms[side].append(torch.log(epsilon + total) if n else None)
    return step.mean(terms)


def moco_method(step: Step, keys: Tensor, memory: Memory, size: int) -> Tensor:
    """Cross-entropy over the keys of the batch and of the queue; the batch's then enter it."""
    terms: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            columns = [keys[1 - side, i]]
            columns += [
                keys[1 - side, j] for j in range(len(step)) if j != i and not step.related(i, j)
            ]
            for held, sample, groups in memory.pool:
                grouped = groups is not None and share_a_group(step.groups[i], groups)
                if sample != step.ids[i] and not grouped:
                    columns.append(held[side])
            if side == 0 and step.hard is not None:
                columns += [caption for caption in step.hard if caption.detach().any()]
            logits = torch.stack([step.features[side, i] @ each for each in columns]) * step.scale
            terms[side].append(torch.log(torch.exp(logits - logits[0]).sum()))
    remember(replace(step, features=keys), memory, size)
    return step.mean(terms)


def learned_bounds(
    step: Step, memory: Memory, number: int, alpha: float, lr: float
) -> list[list[float]]:
    """GloFND's Adam step on the threshold of every sample in the batch, kept in float32."""
    epoch, after = number // 2, {}
    bounds: list[list[float]] = [[], []]
    bare = replace(step, hard=None, bounds=None)
    for side in (0, 1):
        for i, sample in enumerate(step.ids):
            bound, m, v = memory.thresholds.get((side, sample), (1.0, 0.0, 0.0))
            found = bare.similarities(side, i).tolist()
            if found:
                grad = alpha - sum(s > bound for s in found) / len(found)
                m, v = 0.9 * m + 0.1 * grad, 0.98 * v + 0.02 * grad**2
                m_hat, v_hat = m / (1 - 0.9 ** (epoch + 1)), v / (1 - 0.98 ** (epoch + 1))
                bound = min(1.0, max(-1.0, bound - lr * m_hat / (math.sqrt(v_hat) + 1e-8)))
            bounds[side].append(bound)
            after[side, sample] = tuple(torch.tensor([bound, m, v]).float().tolist())
    memory.thresholds |= after
    return bounds


def queue_bounds(
    step: Step, memory: Memory, alpha: float, alignment: str
) -> list[list[float]] | None:
    """The similarity to the queue that floor(alpha n) of its n negatives exceed."""
    if not memory.pool:
        return None
    bounds: list[list[float]] = [[], []]
    held = followed(step, memory, alignment)
    for side in (0, 1):
        for i, sample in enumerate(step.ids):
            found = [
                float(embeddings[side] @ step.features[side, i].detach())
                for embeddings, (_, other, groups) in zip(held, memory.pool, strict=True)
                if other != sample and (groups is None or not share_a_group(step.groups[i], groups))
            ]
            found.sort(reverse=True)
            bounds[side].append(found[int(alpha * len(found))] + 1e-12 if found else 2.0)
    return bounds


def remember(step: Step, memory: Memory, size: int) -> None:
    """The batch enters the pool over the oldest."""
    groups = step.groups or [None] * len(step)
    for i in range(len(step)):
        memory.pool.append((step.features[:, i].detach().flip(0), step.ids[i], groups[i]))
    del memory.pool[: max(0, len(memory.pool) - size)]
    memory.step += 1


def _through_newest(step, pool, keep, anchor, newest, value) -> Tensor:
    """The value with its gradient by the anchor over the newest of the pool alone."""
    side, i = anchor
    first = max(0, len(pool) - newest)
    fresh = [pool[k][0][side] for k in range(first, len(pool)) if keep(i, k)]
    fresh = [p for p in fresh if not step.above(side, i, p)]
    if not fresh:
        return value.detach()
    vectors = torch.stack(fresh)
    weights = torch.softmax((vectors @ step.features[side, i].detach()) * step.scale.detach(), 0)
    centre = weights @ vectors
    linear = step.scale * (step.features[side, i] @ centre - step.positive(i))
    return value.detach() * torch.exp(linear - linear.detach())


def fastclip_rate(step: int) -> float:
    """gamma 0.3 along a cosine of 4 epochs of 2 steps."""
    return published_gamma(step // 2, 0.3, 4.0, "cosine")


def scent_rate(offset: float, epsilon: float) -> Callable[[Tensor], Tensor]:
    return lambda before: torch.sigmoid(torch.log(before + epsilon) + offset)


def log_partitions(step: Step, positive_weight: float) -> Values:
    """AmorLIP's log Z: B - 1 times the mean over the negatives, and the weighted positive."""
    result: Values = [[], []]
    for side in (0, 1):
        for i in range(len(step)):
            g = step.inner(side, i, step.scale)
            if g is None:
                result[side].append(None)
                continue
            ratio = torch.exp(step.positive(i) * step.scale)
            result[side].append(torch.log(ratio * ((len(step) - 1) * g + positive_weight)))
    return result
