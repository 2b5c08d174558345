"""The loss of the token head: loops over captions and vocabulary, in the published form."""

import math

import pytest
import torch
from torch import Tensor

from neuclip.method.losses import token_supervision
from neuclip.method.losses.token_supervision import TokenHead

PAIRS, WIDTH, VOCABULARY, CONTEXT = 6, 5, 11, 7


def captions(number: int) -> Tensor:
    """Start 9, up to four words (some twice), end 10, padding 0."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.zeros(PAIRS, CONTEXT, dtype=torch.int64)
    for row in tokens:
        count = int(torch.randint(1, 5, (), generator=generator))
        words = torch.randint(1, 9, (count,), generator=generator)
        row[: count + 2] = torch.cat([torch.tensor([9]), words, torch.tensor([10])])
    return tokens


def patches(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 + number)
    return torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def head() -> TokenHead:
    torch.manual_seed(3)
    return TokenHead(WIDTH, VOCABULARY).double()


class Published:
    """Batches are counted, and the shares of their captions with each token."""

    def __init__(self) -> None:
        self.batches, self.shares = 0, [0.0] * VOCABULARY

    def __call__(self, model: TokenHead, features: Tensor, tokens: Tensor, weights: list[float]):
        size = len(tokens)
        kept = [set(row.tolist()) for row in tokens]
        self.batches += 1
        for token in range(VOCABULARY):
            self.shares[token] += sum(token in each for each in kept) / size
        total = 0 * features.sum()
        for i, present in enumerate(kept):
            rare = {
                c: math.log((self.batches + 1 / size) / (self.shares[c] + 1 / size))
                for c in present
            }
            norm = features[i] - features[i].mean()
            norm = norm / torch.sqrt((norm**2).mean() + 1e-5)
            norm = norm * model.norm.weight + model.norm.bias
            logits = [
                (model.tokens.weight[c] * norm).sum() + model.tokens.bias[c]
                for c in range(VOCABULARY)
            ]
            log_sum = torch.log(sum(torch.exp(z) for z in logits))
            scale = sum(rare.values())
            for c, value in rare.items():
                if value > 1e-12:
                    total = total - weights[i] * value / scale * (logits[c] - log_sum)
        return total / sum(weights)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_equal_the_loops(rows, weighted, monkeypatch):
    monkeypatch.setattr(token_supervision, "CPU_BLOCK", rows * VOCABULARY)
    model, reference = head(), Published()
    weights = [0.5, 1.0, 0.0, 2.0, 1.0, 1.5] if weighted else [1.0] * PAIRS
    for number in range(4):
        features, tokens = patches(number), captions(number)
        given = torch.tensor(weights).double() if weighted else None
        value = model.loss(features, tokens, given)
        expected = reference(model, features, tokens, weights)
        torch.testing.assert_close(value, expected)
        leaves = [features, *model.parameters()]
        found, wanted = (torch.autograd.grad(each, leaves) for each in (value, expected))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert model.captions == 4 * PAIRS
    assert model.frequencies[9] == model.frequencies[10] == 4 * PAIRS


def test_captions_of_tokens_that_all_have_count_for_nothing():
    model, features = head(), patches(0)
    value = model.loss(features, captions(0)[:1].expand(PAIRS, -1))
    grads = torch.autograd.grad(value, [features, *model.parameters()])
    assert value == 0
    assert not any(grad.any() for grad in grads)


def test_the_state_is_the_whole_memory():
    whole, tokens = head(), captions(1)
    whole.loss(patches(0), captions(0))
    again = TokenHead(WIDTH, VOCABULARY).double()
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.loss(patches(1), tokens), whole.loss(patches(1), tokens))
