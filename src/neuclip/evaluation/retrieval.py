"""Retrieval in both directions over the distinct images and captions of a split.

Image i and caption j belong together if some sample pairs an image pixel-identical to i with the
caption j. This covers an image with several captions and a caption with several images. recall@k is
the share of queries with a right candidate among the best k.
"""

import torch
from torch import Tensor

from neuclip.evaluation.interfaces import RECALL_AT, EncodedSplit, RetrievalResult, first_of_each
from neuclip.evaluation.ranking import Ties, rank


def retrieve(encoded: EncodedSplit, ties: Ties = "against") -> RetrievalResult:
    """recall@1, @5 and @10 in both directions; see `ranking` for the rules for ties."""
    images = encoded.image_features[first_of_each(encoded.image_groups)]
    texts = encoded.text_features[first_of_each(encoded.text_groups)]
    pairs = torch.stack([encoded.text_groups, encoded.image_groups], dim=1)
    of_texts = rank(texts, images, pairs, ties).ahead
    of_images = rank(images, texts, pairs.flip(1), ties).ahead
    return RetrievalResult(
        image_recall=_recalls(of_texts, len(images)),
        text_recall=_recalls(of_images, len(texts)),
        num_images=len(images),
        num_texts=len(texts),
        right_images=of_texts < 1,
        right_texts=of_images < 1,
    )


def _recalls(ahead: Tensor, num_candidates: int) -> dict[int, float]:
    return {k: float((ahead < k).double().mean()) for k in RECALL_AT if k < num_candidates}
