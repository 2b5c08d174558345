"""The prototype network: its answer, its inner step, and the gradients through it."""

import copy

import pytest
import torch
from naive_reference import inners, pairs, prototype_log_normalizers, surrogate

from neuclip.errors import UserError

SCALE = 9.0
EPSILON = 1e-5
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.3),
    "adam": lambda params: torch.optim.Adam(params, lr=0.3),
}


class AdagradNorm:
    """One accumulator for a whole matrix: x <- x - lr grad / sqrt(sum of squared norms)."""

    def __init__(self, params):
        self.params, self.sums = params, [0.0 for _ in params]

    def step(self):
        for k, param in enumerate(self.params):
            self.sums[k] += float(param.grad.square().sum())
            with torch.no_grad():
                param -= 0.3 * param.grad / self.sums[k] ** 0.5


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def prepared(build, **settings):
    """A loss whose prototypes come from another batch, and a batch for it."""
    loss = build("neuclip", epsilon=EPSILON, num_prototypes=5, **settings)
    first, batch = pairs(6, seed=1), pairs(6, seed=2)
    loss(first[0], first[1], scalar(SCALE))
    return loss, batch


def test_the_prediction_equals_the_double_loop(build):
    loss, batch = prepared(build)
    predicted = loss.predict_log_normalizers(batch[0], batch[1], scalar(SCALE))
    expected = prototype_log_normalizers(batch, loss.normalizer.prototypes, SCALE, EPSILON)
    torch.testing.assert_close(predicted, expected)


@pytest.mark.parametrize("log_weights", [False, True])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "adagrad_norm"])
def test_inner_steps_equal_autograd_of_the_objective(build, kind, log_weights):
    loss, batch = prepared(
        build,
        prototype_optimizer=kind,
        log_weights=log_weights,
        inner_steps=3,
        restart_steps=100,
    )
    normalizer = loss.normalizer
    normalizer.optimizer.reset()
    normalizer.weight_optimizer.reset()
    # Both sides apart, for adagrad_norm has one accumulator per side.
    prototypes = [side.clone().requires_grad_() for side in normalizer.prototypes]
    weights = [side.clone().requires_grad_() for side in normalizer.log_weights]
    params = prototypes + (weights if log_weights else [])
    optimizer = AdagradNorm(params) if kind == "adagrad_norm" else OPTIMIZERS[kind](params)
    target = inners(batch, SCALE)
    for _ in range(3):
        for param in params:
            param.grad = None
        alpha = prototype_log_normalizers(
            batch,
            torch.stack(prototypes),
            SCALE,
            EPSILON,
            torch.stack(weights) if log_weights else None,
        )
        objective = torch.exp(-alpha) * (EPSILON + target) + alpha - 1
        (objective.mean(1).sum() / SCALE).backward()
        optimizer.step()
    loss(batch[0], batch[1], scalar(SCALE))
    torch.testing.assert_close(
        normalizer.prototypes, torch.stack(prototypes).detach(), atol=1e-7, rtol=1e-6
    )
    if log_weights:
        torch.testing.assert_close(
            normalizer.log_weights, torch.stack(weights).detach(), atol=1e-7, rtol=1e-6
        )


@pytest.mark.parametrize("log_weights", [False, True])
@pytest.mark.parametrize("gradient", ["detached", "full", "union"])
def test_gradients_equal_autograd_through_the_plain_formula(build, gradient, log_weights):
    gamma, rho = 0.3, 2.0
    loss, batch = prepared(
        build,
        gradient=gradient,
        log_weights=log_weights,
        rho=rho,
        gamma=gamma,
        gamma_schedule="constant",
        steps_per_epoch=1,
        restart_steps=100,
    )
    leaf, scale = batch.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    value = loss(leaf[0], leaf[1], scale)
    got = torch.autograd.grad(value, (leaf, scale))
    # The batch was pushed into the ring after it was read: the prototypes are those it met.
    prototypes = loss.normalizer.prototypes
    weights = loss.normalizer.log_weights if log_weights else None
    same, s = batch.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    predicted = prototype_log_normalizers(same, prototypes, s, 0.0, weights).exp()
    estimate = inners(same, s)
    if gradient == "union":
        mean = (EPSILON + gamma * estimate + (1 - gamma) * predicted).log().mean()
    else:
        fixed = gamma * estimate.detach() + EPSILON
        if gradient == "full":
            alpha = (fixed + (1 - gamma) * predicted).log()
        else:
            alpha = (fixed + (1 - gamma) * predicted.detach()).log()
        mean = surrogate(same, s, alpha, EPSILON).mean()
    expected = mean / s + rho / s
    torch.testing.assert_close(value.detach(), expected.detach())
    for one, other in zip(got, torch.autograd.grad(expected, (same, s)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", ["full", "union"])
@pytest.mark.parametrize("fed", [1, 2, 5])
def test_only_the_newest_prototypes_carry_the_gradient(build, gradient, fed):
    gamma, size, newest, batch = 0.3, 10, 4, 3
    loss = build(
        "neuclip_pool", gradient=gradient, gradient_size=newest, pool_size=size,
        epsilon=EPSILON, gamma=gamma, gamma_schedule="constant", steps_per_epoch=1, rho=2.0,
    )  # fmt: skip
    earlier = pairs(fed * batch, seed=1)
    for image, text in zip(earlier[0].split(batch), earlier[1].split(batch), strict=True):
        loss(image, text, scalar(SCALE))
    prototypes = loss.normalizer.ring.slots[:, : fed * batch].clone()  # the others are empty
    recent = earlier.flip(0)[:, -newest:]
    features = pairs(batch, seed=2)
    leaf, scale = features.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    value = loss(leaf[0], leaf[1], scale)
    got = torch.autograd.grad(value, (leaf, scale))

    same, s = features.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    of_all = prototype_log_normalizers(same, prototypes, s, 0.0).detach()
    of_newest = prototype_log_normalizers(same, recent, s, 0.0)
    predicted = (of_all + of_newest - of_newest.detach()).exp()
    estimate = inners(same, s)
    if gradient == "union":
        mean = (EPSILON + gamma * estimate + (1 - gamma) * predicted).log().mean()
    else:
        alpha = (gamma * estimate.detach() + EPSILON + (1 - gamma) * predicted).log()
        mean = surrogate(same, s, alpha, EPSILON).mean()
    expected = mean / s + 2.0 / s
    torch.testing.assert_close(value.detach(), expected.detach())
    for one, other in zip(got, torch.autograd.grad(expected, (same, s)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("gradient", "newest"), [("detached", None), ("full", None), ("full", 7), ("union", 7)]
)
def test_an_anchors_positives_in_the_pool_are_left_out(build, gradient, newest):
    gamma = 0.3
    mixing = {"gamma": gamma, "gamma_schedule": "constant", "steps_per_epoch": 1}
    settings = {"gradient": gradient, "gradient_size": newest, "pool_size": 10}
    loss = build("neuclip_pool", epsilon=EPSILON, **mixing, **settings, rho=2.0)
    # Pair 3 stands in the pool twice, by two embeddings, and 9 has left it; 20 was never there.
    earlier_ids = torch.tensor([9, 3, 4, 5, 6, 7, 3, 8, 10, 11, 12])
    earlier = pairs(11, seed=1)
    for chosen in (slice(0, 5), slice(5, 11)):
        image, text = earlier[:, chosen]
        loss(image, text, scalar(SCALE), sample_ids=earlier_ids[chosen])
    slots = {10: 0, **{number: number for number in range(1, 10)}}  # embedding, by slot
    ids = torch.tensor([3, 9, 12, 20])
    own = {
        (anchor, slot)
        for anchor in range(4)
        for number, slot in slots.items()
        if ids[anchor] == earlier_ids[number]
    }
    assert len(own) == 3
    prototypes = loss.normalizer.ring.slots.clone()
    torch.testing.assert_close(prototypes[0, slots[10]], earlier[1, 10])
    features = pairs(4, seed=2)
    leaf, scale = features.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    value = loss(leaf[0], leaf[1], scale, sample_ids=ids)
    got = torch.autograd.grad(value, (leaf, scale))

    same, s = features.clone().requires_grad_(), scalar(SCALE).requires_grad_()
    predicted = prototype_log_normalizers(same, prototypes, s, 0.0, own=own)
    if newest is not None:
        old = {(a, slots[n]) for a in range(4) for n in range(1, 11 - newest)}
        of_newest = prototype_log_normalizers(same, prototypes, s, 0.0, own=own | old)
        predicted = predicted.detach() + of_newest - of_newest.detach()
    elif gradient == "detached":
        predicted = predicted.detach()
    estimate = inners(same, s)
    if gradient == "union":
        mean = (EPSILON + gamma * estimate + (1 - gamma) * predicted.exp()).log().mean()
    else:
        fixed = gamma * estimate.detach() + EPSILON
        mean = surrogate(same, s, (fixed + (1 - gamma) * predicted.exp()).log(), EPSILON).mean()
    expected = mean / s + 2.0 / s
    torch.testing.assert_close(value.detach(), expected.detach())
    for one, other in zip(got, torch.autograd.grad(expected, (same, s)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pool_of_full_epochs_is_exact(build):
    """Constant pairs, each twice in the pool: the prediction is exact up to log(1 - 1/n)."""
    features, n = pairs(12, noise=0.1), 12
    loss = build("neuclip_pool", pool_size=2 * n, epsilon=EPSILON)
    for number in range(6):
        ids = torch.arange(4) + 4 * (number % 3)
        loss(features[0, ids], features[1, ids], scalar(SCALE), sample_ids=ids)
    got = loss.predict_log_normalizers(*features, scalar(SCALE), torch.arange(n))
    exact = (EPSILON + (1 - 1 / n) * inners(features, SCALE)).log()
    torch.testing.assert_close(got, exact)
    # Who does not say which pairs they are has them among the negatives.
    predicted = loss.predict_log_normalizers(*features, scalar(SCALE))
    assert float(predicted.min()) > -torch.log(scalar(n))


def test_trained_prototypes_ignore_sample_ids(build):
    """The published network sums over all prototypes."""
    with_ids, without = (build("neuclip") for _ in range(2))
    for _ in range(3):
        image, text = pairs(6, seed=1)
        value = with_ids(image, text, scalar(SCALE), sample_ids=torch.arange(6))
        assert torch.equal(value, without(image, text, scalar(SCALE)))


def test_a_gradient_size_without_a_gradient_is_refused(build):
    with pytest.raises(UserError, match="no effect with gradient 'detached'"):
        build("neuclip_pool", gradient="detached", gradient_size=4)


@pytest.mark.parametrize("method", ["neuclip", "neuclip_pool"])
@pytest.mark.parametrize("gradient", ["detached", "full", "union"])
def test_gamma_one_is_rgcl_batch(build, method, gradient):
    settings = {"rho": 3.0, "epsilon": 1e-6}
    ours = build(method, gradient=gradient, gamma=1.0, **settings)
    plain = build("rgcl_batch", **settings)
    for step in range(6):
        results = []
        for loss in (ours, plain):
            leaf, scale = pairs(5, seed=step).requires_grad_(), scalar(SCALE).requires_grad_()
            value = loss(leaf[0], leaf[1], scale)
            results.append((value.detach(), *torch.autograd.grad(value, (leaf, scale))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_all_other_embeddings_as_prototypes_are_exact(build):
    features = pairs(12, noise=0.4)
    loss = build("neuclip", num_prototypes=11, inner_steps=0, epsilon=EPSILON)
    exact = (EPSILON + inners(features, SCALE)).log()
    for i in range(12):
        others = [j for j in range(12) if j != i]
        loss.normalizer.prototypes.copy_(features.flip(0)[:, others])
        pair = features[:, [i, i]]
        predicted = loss.predict_log_normalizers(pair[0], pair[1], scalar(SCALE))
        torch.testing.assert_close(predicted[:, 0], exact[:, i])


def test_a_fit_on_frozen_features_lowers_objective_and_error(build):
    count, batch = 256, 16
    features = pairs(count, noise=0.7)
    scale = scalar(12.0)
    image, text = features
    similarity = image @ text.T * 12.0
    own = similarity.diagonal().clone()
    similarity.fill_diagonal_(-torch.inf)
    exact = torch.stack([similarity.logsumexp(1), similarity.logsumexp(0)]) - own
    exact -= torch.log(torch.tensor(count - 1.0))
    loss = build("neuclip", num_prototypes=16, inner_steps=2, restart_steps=10**6, epsilon=0.0)

    def judge() -> tuple[float, float]:
        alpha = loss.predict_log_normalizers(image, text, scale)
        objective = (exact - alpha).exp() + alpha - 1
        return float(objective.mean()), float((alpha - exact).square().mean())

    generator = torch.Generator().manual_seed(0)
    judged = []
    for step in range(301):
        chosen = torch.randperm(count, generator=generator)[:batch]
        loss(image[chosen], text[chosen], scale)
        if step in {0, 30, 300}:
            judged.append(judge())
    objectives, errors = zip(*judged, strict=True)
    assert objectives[0] > objectives[1] > objectives[2]
    assert errors[2] < errors[0] / 2


@pytest.mark.parametrize("method", ["neuclip", "neuclip_pool"])
def test_prediction_changes_no_state(build, method):
    loss, batch = build(method), pairs(6, seed=2)
    loss(*pairs(6, seed=1), scalar(SCALE))
    before = copy.deepcopy(loss.state_dict())
    loss.predict_log_normalizers(batch[0], batch[1], scalar(SCALE), torch.arange(6))
    after = loss.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if torch.is_tensor(value) else value == after[key]
