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

SIMILARITIES_AT_ONCE = 2**21


def exact_log_normalizers(
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "samples dim"],
    logit_scale: float,
    epsilon: float,
) -> Float[Tensor, "2 samples"]:
    """log(epsilon + g) of all image anchors (row 0) and text anchors (row 1), in float64.

    One pass over the similarities serves both sides; memory is bounded by a few arrays of
    `SIMILARITIES_AT_ONCE` float64 values (or of one row, if that is more).
    """
    images, texts = image_features.double() * logit_scale, text_features.double()
    count = len(images)
    own = (images * texts).sum(dim=1)
    image_side: list[Tensor] = []
    text_side = torch.full_like(own, -torch.inf)
    rows = max(1, SIMILARITIES_AT_ONCE // count)
    for start in range(0, count, rows):
        logits = images[start : start + rows] @ texts.T
        logits.diagonal(start).fill_(-torch.inf)
        image_side.append(torch.logsumexp(logits, dim=1))
        text_side = torch.logaddexp(text_side, torch.logsumexp(logits, dim=0))
    log_sums = torch.stack([torch.cat(image_side), text_side])
    log_g = log_sums - own - torch.log(own.new_tensor(count - 1))
    return torch.logaddexp(torch.log(own.new_tensor(epsilon)), log_g)


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
    last batch is filled up with anchors of the first, which count once.

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
    predicted = image_features.new_empty(2, count, dtype=torch.double)
    minibatch = torch.empty_like(predicted)
    # Backwards, so that an anchor in two batches keeps what its own (the first) batch says.
    for start in reversed(range(0, count, batch_size)):
        batch = order[torch.arange(start, start + batch_size) % count].to(predicted.device)
        images, texts = image_features[batch], text_features[batch]
        minibatch[:, batch] = exact_log_normalizers(images, texts, logit_scale, loss.epsilon)
        with torch.no_grad():
            answer = loss.predict_log_normalizers(images, texts, scale)
        predicted[:, batch] = torch.stack([answer.image, answer.text]).to(predicted)
    exact = exact_log_normalizers(image_features, text_features, logit_scale, loss.epsilon)
    return NormalizerError(_summary(predicted - exact), _summary(minibatch - exact), batch_size)


def _summary(error: Float[Tensor, "2 samples"]) -> ErrorSummary:
    return ErrorSummary(
        mse=float(error.square().mean()),
        mae=float(error.abs().mean()),
        bias=float(error.mean()),
    )
