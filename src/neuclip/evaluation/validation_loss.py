"""The validation loss: one formula for all methods, so that it can be compared between them.

InfoNCE over a whole split of n pairs, at the model's temperature, in natural logarithms:

    loss = 1 / 2n sum_i [log sum_j exp(s_ij / tau) - s_ii / tau] + the same with the roles swapped

The split is one batch: the value depends on no batch size and on no draw. Guessing gives ln n. It
is the training loss of `openclip` with the batch n; other methods train other losses.
"""

import math

import torch
from torch import Tensor

from neuclip.evaluation.interfaces import EncodedSplit
from neuclip.evaluation.normalizer_error import exact_log_normalizers


def validation_loss(encoded: EncodedSplit, logit_scale: float) -> float | None:
    """InfoNCE over the pairs of a split.

    Each image and each caption occurs once: of samples with equal images or equal captions only the
    first counts, since the others are not negatives. Of several captions the first counts.

    Args:
        encoded: the split.
        logit_scale: 1 / temperature.

    Returns:
        The loss; none for fewer than 2 pairs.
    """
    rows = _distinct_pairs(encoded).to(encoded.image_features.device)
    if len(rows) < 2:
        return None
    images, texts = encoded.image_features[rows], encoded.text_features[rows]
    # log(1 + sum_{j != i} exp(s_ij - s_ii)), where log_g is the logarithm of the sum's mean.
    log_g = exact_log_normalizers(images, texts, logit_scale, epsilon=0.0)
    return float(torch.nn.functional.softplus(log_g + math.log(len(rows) - 1)).mean())


def _distinct_pairs(encoded: EncodedSplit) -> Tensor:
    """Rows of the first captions whose image and caption no earlier row has."""
    images: set[int] = set()
    texts: set[int] = set()
    rows: list[int] = []
    for row in encoded.first_captions().tolist():
        image, text = int(encoded.image_groups[row]), int(encoded.text_groups[row])
        if image not in images and text not in texts:
            images.add(image)
            texts.add(text)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)
