"""Independent references: double loops in linear space, written from the formulas alone."""

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional


def pairs(count: int, dim: int = 8, seed: int = 0, noise: float = 1.0) -> Tensor:
    """Unit-norm images and texts [2, count, dim]; a small noise makes well-aligned pairs."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    sides = [
        centre + noise * torch.randn(count, dim, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]
    return functional.normalize(torch.stack(sides), dim=-1)


def inner(anchors: Tensor, candidates: Tensor, scale: Tensor | float, i: int) -> Tensor:
    """g_i = mean over j != i of exp((a_i . c_j - a_i . c_i) * scale)."""
    count = len(anchors)
    total = torch.zeros((), dtype=anchors.dtype)
    for j in range(count):
        if j != i:
            margin = (anchors[i] * candidates[j]).sum() - (anchors[i] * candidates[i]).sum()
            total = total + torch.exp(margin * scale)
    return total / (count - 1)


def inners(features: Tensor, scale: Tensor | float) -> Tensor:
    """g_i of the image anchors and of the text anchors [2, count]."""
    image, text = features
    count = len(image)
    scales = torch.as_tensor(scale, dtype=features.dtype).expand(2, count)
    return torch.stack(
        [
            torch.stack([inner(image, text, scales[0, i], i) for i in range(count)]),
            torch.stack([inner(text, image, scales[1, i], i) for i in range(count)]),
        ]
    )


def surrogate(features: Tensor, scale: Tensor | float, alpha: Tensor, epsilon: float) -> Tensor:
    """[2, count]: exp(-alpha) (eps + g) + alpha - 1."""
    return torch.exp(-alpha) * (epsilon + inners(features, scale)) + alpha - 1


def published_fastclip(
    features: Tensor, scale: Tensor, u: Tensor, *, epsilon: float, rho: float | None
) -> Tensor:
    """The published two-term loss on one process: `rho` none leaves out the factor tau.

    The first term has local anchors against constant candidates, the second constant anchors
    against candidates with gradient; the scale has its gradient in both.
    """
    image, text = features
    fixed_image, fixed_text = image.detach(), text.detach()
    count = len(image)
    total = torch.zeros((), dtype=features.dtype)
    for i in range(count):
        sides = (
            (image[i], text[i], fixed_image[i], text, fixed_text, u[0, i]),
            (text[i], image[i], fixed_text[i], image, fixed_image, u[1, i]),
        )
        for anchor, own, fixed_anchor, candidates, fixed_candidates, average in sides:
            first = second = torch.zeros((), dtype=features.dtype)
            for j in range(count):
                if j == i:
                    continue
                margin = anchor @ fixed_candidates[j] - anchor @ own
                first = first + torch.exp(scale * margin)
                margin = fixed_anchor @ candidates[j] - (fixed_anchor @ own).detach()
                second = second + torch.exp(scale * margin)
            total = total + (first + second) / (count - 1) / (average + epsilon)
    loss = total / count / 2
    if rho is not None:
        loss = loss / scale.detach() + rho / scale
        loss = loss + (u[0].log() + u[1].log()).mean() / 2 / scale
    return loss


def prototype_log_normalizers(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor | float,
    epsilon: float,
    log_weights: Tensor | None = None,
    own: Collection[tuple[int, int]] = (),
) -> Tensor:
    """alpha [2, count] of a network of prototypes, anchor by anchor.

    `own` has the pairs of an anchor and a prototype that leave each other out.
    """
    result: list[Tensor] = []
    for side in range(2):
        logs: list[Tensor] = []
        for i in range(features.shape[1]):
            total = torch.zeros((), dtype=features.dtype)
            count = prototypes.shape[1]
            for k in range(count):
                if (i, k) in own:
                    continue
                direction = prototypes[side, k] / prototypes[side, k].norm()
                weight = (
                    torch.softmax(log_weights[side], 0)[k] if log_weights is not None else 1 / count
                )
                margin = features[side, i] @ direction - features[0, i] @ features[1, i]
                total = total + weight * torch.exp(margin * scale)
            logs.append(torch.log(epsilon + total))
        result.append(torch.stack(logs))
    return torch.stack(result)


def sigmoid_loss(features: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss."""
    image, text = features
    total = torch.zeros((), dtype=features.dtype)
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1.0 if i == j else -1.0
            total = total + torch.log(1 + torch.exp(-z * (image[i] @ text[j] * scale + bias)))
    return total / len(image)


def published_gamma(epoch: int, final: float, decay: float, schedule: str) -> float:
    """FastCLIP's weight of the fresh estimate."""
    if epoch == 0:
        return 1.0
    if epoch >= decay or schedule == "constant":
        return final
    return 0.5 * (1 + math.cos(math.pi * epoch / decay)) * (1 - final) + final
