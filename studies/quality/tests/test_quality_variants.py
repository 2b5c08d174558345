"""The variants, against what they are made of."""

import math

import pytest
import torch
from studies.quality.suspects import SUSPECTS
from studies.quality.variants import POOL_VARIANTS, VARIANTS, register_variants
from torch.nn.functional import normalize

from neuclip.catalogue.create import create_loss

SCALE, BATCH, WIDTH = 12.0, 8, 6


@pytest.fixture(autouse=True)
def _registered():
    register_variants()


def made(name: str, **settings):
    settings = {"pool_size": 24, "gamma": 0.4, "gamma_schedule": "constant", "rho": 5.0, **settings}
    return create_loss(name, embed_dim=WIDTH, total_steps=40, steps_per_epoch=5, **settings)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        normalize(torch.randn(2, BATCH, WIDTH, generator=generator), dim=-1) for _ in range(count)
    ]


def gradients(loss, features, ids, **others) -> tuple[torch.Tensor, torch.Tensor, float]:
    """By the embeddings and by 1 / temperature, and the value."""
    given, scale = features.clone().requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    value = loss(*given, scale, sample_ids=ids, **others)
    value.backward()
    by_scale = torch.zeros(()) if scale.grad is None else scale.grad
    return given.grad, by_scale, float(value.detach())


def last_step(name: str, seen: int = 4, **settings):
    """The gradients of the last of some steps, and the loss."""
    loss, found = made(name, **settings), None
    for step, features in enumerate(batches(seen)):
        ids = torch.arange(BATCH) + step * BATCH
        keys = {"key_features": features.flip(-1)} if name == "pool_momentum" else {}
        found = gradients(loss, features, ids, **keys)
    return *found, loss


def test_suspects_need_these_variants():
    named = {str(suspect.settings["name"]) for suspect in SUSPECTS if "name" in suspect.settings}
    assert named == set(VARIANTS)


def test_a_constant_temperature_has_no_gradient_and_the_towers_that_of_the_pool():
    pool, variant = last_step("neuclip_pool"), last_step("pool_constant_temperature")
    assert torch.equal(pool[0], variant[0])
    assert (float(pool[1]) != 0, float(variant[1])) == (True, 0)
    assert not variant[-1].learns_temperature
    assert pool[2] - variant[2] == pytest.approx(5 / SCALE, abs=1e-5)  # rho tau


def test_the_temperature_learns_by_infonce_and_the_towers_by_the_pool():
    pool, variant = last_step("neuclip_pool"), last_step("pool_infonce_temperature")
    infonce = create_loss("openclip", embed_dim=WIDTH)
    own = gradients(infonce, batches(4)[-1], torch.arange(BATCH))
    assert torch.equal(pool[0], variant[0])
    assert float(variant[1]) == pytest.approx(float(own[1]))
    assert pool[2] - variant[2] == pytest.approx(5 / SCALE, abs=1e-5)


def test_keys_fill_the_pool_and_the_batch_estimate_is_the_towers():
    *_, loss = last_step("pool_momentum")
    held = loss.normalizer.ring.slots
    keys = torch.cat([features.flip(-1) for features in batches(4)[-3:]], 1).flip(0)
    assert torch.equal(held.sort(1).values, keys.to(held.dtype).sort(1).values)
    assert loss.key_momentum == 0.995
    first = made("pool_momentum"), made("neuclip_pool")
    features, ids = batches(1)[0], torch.arange(BATCH)
    one = gradients(first[0], features, ids, key_features=features.flip(-1))
    assert torch.equal(one[0], gradients(first[1], features, ids)[0])  # the pool is empty


def test_gamma_follows_each_anchors_variance_in_a_naive_loop():
    """The mixture of the last step, from the pool of the three batches before it, in float64."""
    *_, loss = last_step("pool_variance_gamma")
    before, last = torch.cat(batches(4)[:3], 1).double(), batches(4)[3].double()
    normalizers, gammas = [], []
    for side in (0, 1):
        for i in range(BATCH):
            own = float(last[0, i] @ last[1, i])
            pool = [math.exp(SCALE * (float(last[side, i] @ e) - own)) for e in before[1 - side]]
            batch = [
                math.exp(SCALE * (float(last[side, i] @ last[1 - side, j]) - own))
                for j in range(BATCH) if j != i
            ]  # fmt: skip
            shares = [each / sum(pool) for each in pool]
            variance = (len(pool) * sum(p * p for p in shares) - 1) / (BATCH - 1)
            gamma = 0.4 + 0.6 / (1 + variance)
            gammas.append(gamma)
            mixed = (1 - gamma) * sum(pool) / len(pool) + gamma * sum(batch) / len(batch)
            normalizers.append(math.log(mixed))
    metrics = loss.metrics()
    assert metrics["gamma"] == pytest.approx(sum(gammas) / len(gammas), rel=1e-5)
    assert metrics["log_normalizer"] == pytest.approx(sum(normalizers) / 16, abs=1e-5)
    assert 0.4 < min(gammas) < max(gammas) < 1


@pytest.mark.parametrize("name", POOL_VARIANTS)
def test_gradients_stay_finite_through_the_schedule(name):
    found = last_step(name, seen=12, gamma_schedule="cosine")
    assert torch.isfinite(found[0]).all()
    assert math.isfinite(found[2])


def test_groups_are_batches_of_their_own():
    """Values, gradients and log-normalizers of 40 pairs, of which the last 8 are a group."""
    generator = torch.Generator().manual_seed(2)
    features = normalize(torch.randn(2, 40, WIDTH, generator=generator), dim=-1)
    ids = torch.arange(40)
    batch = create_loss("rgcl_batch", embed_dim=WIDTH)
    grouped = create_loss("rgcl_groups", embed_dim=WIDTH)
    by_features, by_scale, value = gradients(grouped, features, ids)
    parts = [gradients(batch, part, ids[: part.shape[1]]) for part in features.split(16, dim=1)]
    assert value == pytest.approx(sum(part[2] for part in parts) / 3)
    torch.testing.assert_close(by_features, torch.cat([part[0] for part in parts], 1) / 3)
    assert float(by_scale) == pytest.approx(sum(float(part[1]) for part in parts) / 3)
    found = grouped.predict_log_normalizers(*features, SCALE)
    alone = [batch.predict_log_normalizers(*part, SCALE) for part in features.split(16, dim=1)]
    torch.testing.assert_close(found, torch.cat(alone, 1))
    halves = create_loss("rgcl_groups", embed_dim=WIDTH, group_size=32)
    assert halves(*features, SCALE) == pytest.approx(
        float(sum(batch(*part, SCALE) for part in features.split(32, dim=1))) / 2
    )


def test_groups_with_the_normalizers_of_the_whole_batch():
    """Against the formula, in float64."""
    generator = torch.Generator().manual_seed(4)
    features = normalize(torch.randn(2, 48, WIDTH, generator=generator).double(), dim=-1)
    loss = create_loss("rgcl_groups", embed_dim=WIDTH, normalizers="batch", rho=2.0, epsilon=0.0)
    assert loss.predict_log_normalizers(*features, SCALE).isfinite().all()  # takes no part
    found = gradients(loss, features, torch.arange(48))

    given = features.clone().requires_grad_()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    same = torch.eye(48, dtype=torch.bool)
    apart = torch.block_diag(*torch.ones(3, 16, 16)) == 0
    terms = []
    for side in (given[0] @ given[1].T, given[1] @ given[0].T):
        logits = scale * (side - side.diagonal()[:, None])
        alpha = logits.detach().masked_fill(same, -torch.inf).logsumexp(1) - math.log(47)
        group = logits.masked_fill(same | apart, -torch.inf).logsumexp(1) - math.log(15)
        terms.append((group - alpha).exp() + alpha - 1)
    value = torch.stack(terms).mean() / scale + 2.0 / scale
    value.backward()
    torch.testing.assert_close(found[0], given.grad)
    torch.testing.assert_close(found[1].double(), scale.grad, rtol=1e-5, atol=1e-7)
    assert found[2] == pytest.approx(float(value.detach()), rel=1e-6)


def test_a_pool_takes_the_groups_one_after_the_other():
    generator = torch.Generator().manual_seed(3)
    plain, grouped = made("neuclip_pool", rho=0.0), made("pool_groups", rho=0.0)
    for step in range(3):
        features = normalize(torch.randn(2, 64, WIDTH, generator=generator), dim=-1)
        ids = torch.arange(64) + 32 * step  # half of the pairs come again
        alone = [
            gradients(plain, part, mine)
            for part, mine in zip(features.split(16, dim=1), ids.split(16), strict=True)
        ]
        found = gradients(grouped, features, ids)
        torch.testing.assert_close(found[0], torch.cat([part[0] for part in alone], 1) / 4)
        assert found[2] == pytest.approx(sum(part[2] for part in alone) / 4)
    assert grouped.normalizer.gamma.end == 4 * plain.normalizer.gamma.end


def by_loops(
    kind: str, batches_seen: list[torch.Tensor], gamma: float, *, union: bool = False
) -> torch.Tensor:
    """The gradient of the last batch of neighbouring pairs, in float64; rho and epsilon are 0.

    The pool holds all earlier batches; every batch has pairs of its own.
    """
    *earlier, last = [each.double() for each in batches_seen]
    alphas = [log_normalizers(kind, batches_seen[: n + 1], gamma) for n in range(3)]
    similar = [SCALE * (each[0] * each[1]).sum(-1) for each in earlier]
    partitions = [
        torch.cat([own + alpha[side] for own, alpha in zip(similar, alphas, strict=True)])
        for side in range(2)
    ]
    features = last.clone().requires_grad_()
    constants = torch.cat(earlier, dim=1)
    if "aligned" in kind:
        constants = moved(constants, last)
    total = torch.zeros(())
    for side, i in [(side, i) for side in range(2) for i in range(BATCH)]:
        anchor, partner = features[side, i], features[1 - side, i]
        others, candidates = features[1 - side], constants[1 - side]
        detached = kind in {"pool_aligned", "pool_balanced"}
        positive = anchor @ (partner.detach() if detached else partner)
        predicted = ((candidates @ anchor - positive) * SCALE).exp().mean().log()
        if "two_sided" in kind:  # the partner of the anchor, as a negative of the pool's
            weights = (SCALE * constants[side] @ partner.detach() - partitions[side]).softmax(0)
            pushed = SCALE * partner @ (weights @ constants[side])
            predicted = predicted + pushed - pushed.detach()
        fresh = sum(
            ((anchor @ others[j] - anchor @ partner) * SCALE).exp() for j in range(BATCH) if j != i
        ) / (BATCH - 1)
        alpha = ((1 - gamma) * predicted.exp() + gamma * (fresh if union else fresh.detach())).log()
        term = alpha if union else (-alpha).exp() * fresh + alpha - 1
        total = total + term / (2 * BATCH * SCALE)
    total.backward()
    return features.grad


def moved(pool: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """The pool with the mean of the batch, for images and texts apart."""
    return normalize(pool + batch.mean(1, keepdim=True) - pool.mean(1, keepdim=True), dim=-1)


def log_normalizers(kind: str, batches_seen: list[torch.Tensor], gamma: float):
    """Those of the last batch: of the batch alone where it is the first."""
    *earlier, last = [each.double() for each in batches_seen]
    found = []
    for side in range(2):
        similar = (last[side] @ last[1 - side].T - (last[0] * last[1]).sum(-1)[:, None]) * SCALE
        similar.fill_diagonal_(-torch.inf)
        fresh = similar.exp().sum(1) / (BATCH - 1)
        if earlier:
            pool = torch.cat(earlier, dim=1)
            pool = (moved(pool, last) if "aligned" in kind else pool)[1 - side]
            predicted = ((last[side] @ pool.T - (last[0] * last[1]).sum(-1)[:, None]) * SCALE).exp()
            fresh = (1 - gamma) * predicted.mean(1) + gamma * fresh
        found.append(fresh.log())
    return found


@pytest.mark.parametrize("gradient", ["full", "union"])
@pytest.mark.parametrize(
    "kind",
    ["neuclip_pool", "pool_aligned", "pool_aligned_two_sided", "pool_balanced", "pool_two_sided"],
)
def test_the_gradient_through_the_pool_is_that_of_the_formula(kind, gradient):
    settings = {"rho": 0.0, "gamma_schedule": "final", "epsilon": 0.0, "gradient": gradient}
    found = last_step(kind, **settings)
    expected = by_loops(kind, batches(4), 0.4, union=gradient == "union")
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-6)
    if "aligned" not in kind:  # the others have the values of the pool
        assert found[2] == pytest.approx(last_step("neuclip_pool", **settings)[2])
