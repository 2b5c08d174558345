"""The current batch as the normalizer: alpha_i = log(eps + g^_i), without the positive."""

from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.notation import Anchors
from neuclip.method.objective import log_plus


class MinibatchNormalizer(nn.Module):
    """Log-normalizers from the current batch alone, as in RGCL-g with gamma = 1.

    Args:
        epsilon: stabiliser of the objective.
    """

    direct = False
    needs_sample_ids = False

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Returns the batch estimates, as constants."""
        return log_plus(anchors.log_inner.detach(), self.epsilon)

    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Returns the batch estimates: there is no memory."""
        return self.estimate(anchors)

    def metrics(self) -> dict[str, Tensor | float]:
        """Returns no metrics: the loss reports the batch estimate."""
        return {}
