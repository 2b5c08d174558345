"""How many captions are longer than a model reads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def count_truncated(
    tokenize: Callable[..., Tensor], texts: Sequence[str], tokens: Tensor | None = None
) -> int:
    """Number of texts with more tokens than the tokenizer's context; their end is cut off.

    Args:
        tokenize: an open_clip tokenizer. Without a `context_length`, its context is unknown and the
            result is 0.
        texts: the texts.
        tokens: [texts, context] their tokens, if they are known.
    """
    length = getattr(tokenize, "context_length", None)
    if not isinstance(length, int) or not texts:
        return 0
    padding = tokenize([""])[0, -1]
    rows = tokenize(list(texts)) if tokens is None else tokens
    full = torch.nonzero(rows[:, -1] != padding).flatten().tolist()
    if not full:
        return 0
    longer = tokenize([texts[row] for row in full], context_length=length + 1)
    return int((longer[:, -1] != padding).sum())
