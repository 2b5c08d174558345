"""How alike a batch is: embeddings and captions. For records and warning signs; costs no pass."""

from collections import Counter
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from neuclip.parallel import collectives


def mean_cosines(mean_features: Float[Tensor, "2 dim"], pairs: int) -> dict[str, float]:
    """The mean cosine of two different images of a batch, and of two different texts.

    For unit vectors it is (B |m|^2 - 1) / (B - 1) with their mean m; all ranks call this together.

    Args:
        mean_features: this rank's mean embeddings of images and of texts, over equal numbers.
        pairs: B, over all ranks.
    """
    mean = collectives.mean_over_ranks(mean_features.clone())
    square = mean.square().sum(-1)
    image, text = ((pairs * square - 1) / (pairs - 1)).tolist()
    return {"image_cosine": image, "text_cosine": text}


def equal_captions(captions: Iterable[str]) -> float:
    """Fraction of the captions of a batch that another pair has, too; empty ones do not count."""
    counts = Counter(caption for caption in captions if caption)
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / max(1, counts.total())
