"""Measures the error of a method's log-normalizers.

The exact value for image anchor i of n pairs (with the roles swapped for text anchors):

    log_normalizer_i = log(eps + g_i),      g_i = mean_{j != i} exp((s_ij - s_ii) * logit_scale)

The same n features are split into random batches. The mini-batch estimate computes g_i within the
batch of i; the method predicts from the batch and its own state.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from neuclip.evaluation.interfaces import ErrorSummary, LogNormalizerPredictor, NormalizerError
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import share_out

SIMILARITIES_AT_ONCE = 2**21
_WITHOUT_FLOAT64 = {"mps"}


def exact_log_normalizers(
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "samples dim"],
    logit_scale: float,
    epsilon: float,
) -> Float[Tensor, "2 samples"]:
    """log(epsilon + g) of all image anchors (row 0) and text anchors (row 1), in float64.

    Memory is bounded: a few arrays of `SIMILARITIES_AT_ONCE` float64 values, or of one row if that
    is more. The ranks pass the same features and share the rows. The result is on the features'
    device, or on the CPU if that has no float64.
    """
    images, texts = _in_float64(image_features), _in_float64(text_features)
    own = (images * texts).sum(dim=1) * logit_scale
    log_sums = torch.stack(
        [_log_sums(images * logit_scale, texts), _log_sums(texts * logit_scale, images)]
    )
    log_g = log_sums - own - torch.log(own.new_tensor(len(own) - 1))
    return torch.logaddexp(torch.log(own.new_tensor(epsilon)), log_g)


def _in_float64(features: Float[Tensor, "samples dim"]) -> Float[Tensor, "samples dim"]:
    """Features in float64, on the CPU if their device has none."""
    return (features.cpu() if features.device.type in _WITHOUT_FLOAT64 else features).double()


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
    """Error of the predicted log-normalizers over a split, and of the mini-batch estimate.

    Both use the same random batches. The batch size is at most half the split, since the full split
    as one batch would be exact; it is reported. If it does not divide the split, the last batch is
    filled with anchors of the first, which count once. The ranks pass the same features and share
    full batches.

    Args:
        image_features: unit-norm features of the split's images.
        text_features: unit-norm features of the split's captions.
        loss: predicts log-normalizers. It gets no sample ids, since its state belongs to the
            training data.
        logit_scale: 1 / temperature.
        batch_size: pairs in a batch.
        seed: seed of the partition.

    Returns:
        The errors; none for fewer than 4 pairs, which do not make two batches.
    """
    count = len(image_features)
    batch_size = min(batch_size, count // 2)
    if batch_size < 2:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    scale = image_features.new_tensor(logit_scale)
    starts = range(0, count, batch_size)

    def estimates(pieces: range) -> list[Float[Tensor, "2 2 own"]]:
        """Predicted and mini-batch log-normalizers of the anchors of some batches."""
        found: list[Tensor] = []
        for start in starts[pieces.start : pieces.stop]:
            batch = order[torch.arange(start, start + batch_size) % count]
            batch = batch.to(image_features.device)
            images, texts = image_features[batch], text_features[batch]
            with collectives.alone(), torch.no_grad():
                predicted = loss.predict_log_normalizers(images, texts, scale)
                minibatch = exact_log_normalizers(images, texts, logit_scale, loss.epsilon)
            found.append(
                torch.stack([predicted.cpu().to(minibatch.dtype), minibatch.cpu()])[
                    ..., : count - start
                ]
            )
        return found

    with loss.full_state():
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
