"""Retrieval both ways over the distinct pictures and captions of a split.

Picture i and caption j belong together when some sample pairs a picture pixel-identical to i with
the caption j. One picture with several captions, and one caption with several pictures, are both
cases of it. recall@k is the share of queries with any right candidate among the best k.
"""

import torch
from torch import Tensor

from neuclip.evaluation.interfaces import RECALL_AT, EncodedSplit, RetrievalResult, first_of_each
from neuclip.evaluation.ranking import Ties, wrong_ahead


def retrieve(encoded: EncodedSplit, ties: Ties = "against") -> RetrievalResult:
    """recall@1, @5 and @10 both ways. Ties count against the model (see `ranking`)."""
    images = encoded.image_features[first_of_each(encoded.image_groups)]
    texts = encoded.text_features[first_of_each(encoded.text_groups)]
    pairs = torch.stack([encoded.text_groups, encoded.image_groups], dim=1)
    of_texts = wrong_ahead(texts, images, pairs, ties)
    of_images = wrong_ahead(images, texts, pairs.flip(1), ties)
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
