"""openclip, siglip and rgcl_batch against open_clip and against double loops."""

import open_clip.loss
import pytest
import torch
from naive_reference import inners, pairs, sigmoid_loss, surrogate
from torch import Tensor

from neuclip.method.losses import sigmoid

INPUTS = {
    "random": lambda: pairs(9),
    "aligned": lambda: pairs(9, noise=0.1),
    "clustered": lambda: pairs(3, noise=0.05).repeat(1, 3, 1),
}


def gradients(loss, features: Tensor, *scalars: Tensor, **more) -> tuple[Tensor, ...]:
    """Value and gradients by features and scalars."""
    leaf = features.clone().requires_grad_()
    leaves = [scalar.clone().requires_grad_() for scalar in scalars]
    value = loss(leaf[0], leaf[1], *leaves, **more)
    return value.detach(), *torch.autograd.grad(value, [leaf, *leaves])


def all_close(got, expected, **tolerance):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_openclip_equals_cliploss(build, kind, scale):
    features, scale = INPUTS[kind](), torch.tensor(scale, dtype=torch.float64)
    got = gradients(build("openclip"), features, scale)
    all_close(got, gradients(open_clip.loss.ClipLoss(), features, scale))


def test_infonce_is_rgcl_with_the_batch_normalizer(build):
    """Its feature gradient is that of RGCL with eps = 1/(B-1), divided by tau."""
    features, scale = pairs(7), torch.tensor(20.0, dtype=torch.float64)
    infonce = gradients(build("openclip"), features, scale)[1]
    member = gradients(build("rgcl_batch", epsilon=1 / 6), features, scale)[1]
    torch.testing.assert_close(infonce, member * scale)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -10.0), (2.0, 3.0)])
def test_siglip_equals_open_clip_and_the_double_loop(build, kind, scale, bias, monkeypatch):
    monkeypatch.setattr(sigmoid, "LOGITS_AT_ONCE", 9 * 4)  # chunks of 4, 4 and 1 rows
    features = INPUTS[kind]()
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (scale, bias))
    got = gradients(build("siglip"), features, scale, bias)
    all_close(got, gradients(open_clip.loss.SigLipLoss(), features, scale, bias))
    naive = gradients(
        lambda image, text, s, b: sigmoid_loss(torch.stack([image, text]), s, b),
        features,
        scale,
        bias,
    )
    all_close(got, naive)


def test_siglip_saves_no_tensor_of_the_size_of_the_logits(build, monkeypatch):
    monkeypatch.setattr(sigmoid, "LOGITS_AT_ONCE", 32)
    saved: list[int] = []
    features = pairs(32).requires_grad_()
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (10.0, -10.0))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        build("siglip")(features[0], features[1], scale, bias)
    assert max(saved) < 32 * 32


@pytest.mark.parametrize("kind", INPUTS)
def test_rgcl_batch_equals_the_double_loop(build, kind):
    """The value and the gradients are those of the objective with the batch's g."""
    features, scale = INPUTS[kind](), torch.tensor(25.0, dtype=torch.float64)
    epsilon, rho = 1e-6, 6.5

    def reference(image, text, s):
        logs = (epsilon + inners(torch.stack([image, text]), s)).log()
        return logs.mean() / s + rho / s

    got = gradients(build("rgcl_batch", epsilon=epsilon, rho=rho), features, scale)
    all_close(got, gradients(reference, features, scale))


def test_a_remembered_alpha_gives_the_gradient_of_the_surrogate(build):
    """The moving average of a second visit, in exact arithmetic."""
    first, second = pairs(6, seed=1), pairs(6, seed=2)
    scale, ids = torch.tensor(12.0, dtype=torch.float64), torch.arange(6)
    loss = build("sogclr", gamma=0.3, epsilon=1e-4)
    loss(first[0], first[1], scale, sample_ids=ids)
    alpha = (0.7 * inners(first, 12.0) + 0.3 * inners(second, 12.0) + 1e-4).log()
    leaf = second.clone().requires_grad_()
    value = loss(leaf[0], leaf[1], scale, sample_ids=ids)
    (grad,) = torch.autograd.grad(value, leaf)
    copy = second.clone().requires_grad_()
    expected = surrogate(copy, 12.0, alpha, 1e-4).mean() / 12.0
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, copy)[0])
