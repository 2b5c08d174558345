"""How far are a method's log-normalizers from the exact ones?

Exact, for the image anchor i of n pairs (for text anchors with the roles swapped):

    log_normalizer_i = log(eps + g_i),      g_i = mean_{j != i} exp((s_ij - s_ii) * logit_scale)

The same n features are cut into random batches. The mini-batch estimate forms g_i within i's
batch; the method predicts from the batch and from whatever it remembers.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from neuclip.evaluation.interfaces import ErrorSummary, LogNormalizerPredictor, NormalizerError
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import share_out

SIMILARITIES_AT_ONCE = 2**21


def exact_log_normalizers(
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "samples dim"],
    logit_scale: float,
    epsilon: float,
) -> Float[Tensor, "2 samples"]:
    """log(epsilon + g) of all image anchors (row 0) and text anchors (row 1), in float64.

    Memory is bounded by a few arrays of `SIMILARITIES_AT_ONCE` float64 values (or of one row, if
    that is more). Several processes, which all pass the same features, share the rows out.
    """
    images, texts = image_features.double(), text_features.double()
    own = (images * texts).sum(dim=1) * logit_scale
    log_sums = torch.stack(
        [_log_sums(images * logit_scale, texts), _log_sums(texts * logit_scale, images)]
    )
    log_g = log_sums - own - torch.log(own.new_tensor(len(own) - 1))
    return torch.logaddexp(torch.log(own.new_tensor(epsilon)), log_g)


def _log_sums(
    queries: Float[Tensor, "samples dim"], candidates: Float[Tensor, "samples dim"]
) -> Float[Tensor, " samples"]:
    """Log sum_{j != i} exp(query_i . candidate_j)."""
    rows = max(1, SIMILARITIES_AT_ONCE // len(candidates))
    starts = range(0, len(queries), rows)

    def sums(pieces: range) -> list[Tensor]:
        found: list[Tensor] = []
        for start in starts[pieces.start : pieces.stop]:
            logits = queries[start : start + rows] @ candidates.T
            logits.diagonal(start).fill_(-torch.inf)
            found.append(torch.logsumexp(logits, dim=1))
        return [torch.cat(found).cpu()] if found else []

    return torch.cat(share_out(len(starts), sums)).to(queries.device)


def normalizer_error(
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "samples dim"],
    loss: LogNormalizerPredictor,
    logit_scale: float,
    batch_size: int,
    seed: int = 0,
) -> NormalizerError | None:
    """Error of the predicted log-normalizers over a split, beside the mini-batch estimate's.

    Both are judged on the same random batches. The batch size is at most half the split (the
    split as one batch would be exact), and is reported. Where it does not divide the split, the
    last batch is filled up with anchors of the first, which count once. Several processes, which
    all pass the same features, share whole batches out.

    Args:
        image_features: Unit-norm features of the split's pictures.
        text_features: Unit-norm features of the split's captions.
        loss: Predicts log-normalizers; never given sample ids, since the split is not what its
            memory was filled with.
        logit_scale: 1 / temperature.
        batch_size: Pairs in a batch.
        seed: Seed of the partition.

    Returns:
        The errors; none for fewer than 4 pairs, of which no two batches can be made.
    """
    count = len(image_features)
    batch_size = min(batch_size, count // 2)
    if batch_size < 2:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    scale = image_features.new_tensor(logit_scale)
    starts = range(0, count, batch_size)

    def estimates(pieces: range) -> list[Float[Tensor, "2 2 own"]]:
        """Predicted and mini-batch log-normalizers of some batches' own anchors."""
        found: list[Tensor] = []
        for start in starts[pieces.start : pieces.stop]:
            batch = order[torch.arange(start, start + batch_size) % count]
            batch = batch.to(image_features.device)
            images, texts = image_features[batch], text_features[batch]
            with collectives.alone(), torch.no_grad():
                predicted = loss.predict_log_normalizers(images, texts, scale)
                minibatch = exact_log_normalizers(images, texts, logit_scale, loss.epsilon)
            found.append(
                torch.stack([predicted.to(minibatch), minibatch])[..., : count - start].cpu()
            )
        return found

    with loss.whole():
        estimated = torch.cat(share_out(len(starts), estimates), dim=-1)
    exact = exact_log_normalizers(image_features, text_features, logit_scale, loss.epsilon)
    error = estimated - exact.cpu()[:, order]
    return NormalizerError(_summary(error[0]), _summary(error[1]), batch_size)


def _summary(error: Float[Tensor, "2 samples"]) -> ErrorSummary:
    return ErrorSummary(
        mse=float(error.square().mean()),
        mae=float(error.abs().mean()),
        bias=float(error.mean()),
    )
