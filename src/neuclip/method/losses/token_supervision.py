"""Supervision by the tokens of the captions (SuperCLIP, arXiv 2512.14480, beside any method).

    z_i    = W LayerNorm(p_i) + b                 p_i: mean of the patch features of image i
    w_c    = log( (n + 1) / (n_c + 1) )           n captions seen so far, n_c of them with token c
    t_ic   = w_c / (sum of w over the tokens of caption i), for these tokens; 0 for others
    L      = mean_i -sum_c t_ic log softmax(z_i)_c

n and n_c count the captions of all ranks, those of the batch included. The published code counts
batches N and shares of captions F_c and has log((N + 1/B) / (F_c + 1/B)) with the global batch B,
which is the same number. It takes all token ids of a caption, special ones and padding too. So does
this: a token that every caption has, such as the end of text, has w_c = 0. (Padding has the id of
"!" in CLIP's tokenizer, so that word is not supervised.) A caption without any rarer token has no
part in the loss.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuclip.method.notation import shares
from neuclip.method.softmax.blocks import CPU_BLOCK, CUDA_BLOCK
from neuclip.parallel import collectives


class TokenHead(nn.Module):
    """Predicts the tokens of captions from patch features, and counts how common each is.

    Args:
        width: of the patch features.
        vocabulary: number of token ids.

    Attributes:
        captions: n, the captions seen.
        frequencies: n_c, the captions seen with each token.
    """

    captions: Int64[Tensor, ""]
    frequencies: Int64[Tensor, " vocabulary"]

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Linear(width, vocabulary)
        self.register_buffer("captions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frequencies", torch.zeros(vocabulary, dtype=torch.int64))

    def forward(self, patches: Float[Tensor, "pairs width"]) -> Float[Tensor, "pairs vocabulary"]:
        """The logits z."""
        return self.tokens(self.norm(patches))

    def loss(
        self,
        patches: Float[Tensor, "local width"],
        tokens: Int64[Tensor, "local context"],
        pair_weights: Float[Tensor, " local"] | None = None,
    ) -> Float[Tensor, ""]:
        """Counts a batch, and computes this rank's part of its loss; its mean over ranks is L.

        All ranks call this together, with equal numbers of pairs. No matrix of pairs by vocabulary
        is kept but for one block of rows.

        Args:
            patches: mean patch features of this rank's images.
            tokens: of their captions.
            pair_weights: weights of the pairs in the mean; none: all weigh the same.
        """
        patches = patches.to(self.tokens.weight.dtype)
        tokens, first = _distinct(tokens)
        self._count(tokens, first)
        target = _targets(self._weights()[tokens] * first)
        limit = CUDA_BLOCK if patches.is_cuda else CPU_BLOCK
        rows = max(1, limit // len(self.frequencies))
        one = len(patches) <= rows
        of_block = self._losses if one else partial(_recomputed, self._losses)
        parts = zip(patches.split(rows), tokens.split(rows), target.split(rows), strict=True)
        losses = torch.cat([of_block(*part) for part in parts])
        if pair_weights is None:
            return losses.mean()
        layout = collectives.layout_of(len(losses), equal=True)
        weights = pair_weights.to(losses.device, losses.dtype, non_blocking=True)
        return (losses * shares(weights, layout)).sum()

    def _losses(self, patches: Tensor, tokens: Tensor, target: Tensor) -> Float[Tensor, " pairs"]:
        logits = self(patches)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_sum = torch.logsumexp(logits, 1)
        return target.sum(1) * log_sum - (target * logits.gather(1, tokens)).sum(1)

    @torch.no_grad()
    def _count(self, tokens: Tensor, first: Tensor) -> None:
        """Adds the captions of all ranks to the counts."""
        found = torch.zeros_like(self.frequencies)
        found.scatter_add_(0, tokens.flatten(), first.flatten().long())
        counted = torch.cat([found, torch.full_like(found[:1], len(tokens))])
        collectives.sum_over_ranks(counted)
        self.frequencies += counted[:-1]
        self.captions += counted[-1]

    @torch.no_grad()
    def _weights(self) -> Float[Tensor, " vocabulary"]:
        """The weight of every token."""
        dtype = self.tokens.weight.dtype
        return ((self.captions + 1).to(dtype) / (self.frequencies + 1).to(dtype)).log()


def _distinct(
    tokens: Int64[Tensor, "pairs context"],
) -> tuple[Int64[Tensor, "pairs context"], Tensor]:
    """The tokens of each caption in order, and which of them are the first of their kind."""
    ordered = tokens.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, first


def _targets(weights: Float[Tensor, "pairs context"]) -> Float[Tensor, "pairs context"]:
    """The weights over their sum; 0 if all are."""
    total = weights.sum(1, keepdim=True)
    return weights / total.clamp_min(torch.finfo(weights.dtype).tiny)


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The result of a function whose activations are computed again in the backward pass."""
    found = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found
