"""Keys for the losses that contrast with some, in place of those of momentum towers."""

from torch import Tensor, nn
from torch.nn import functional


def keys_for(loss: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """The argument `key_features`, near the features, row by row; empty: the loss takes none.

    Args:
        loss: of any method.
        features: images and texts, [2, pairs, dim].
    """
    if loss.key_momentum is None:
        return {}
    moved = features.detach() + 0.4 * features.detach().roll(1, -1)
    return {"key_features": functional.normalize(moved, dim=-1)}
