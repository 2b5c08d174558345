"""The batch itself as the normalizer: alpha_i = log(eps + g^_i), positive excluded (gamma = 1)."""

from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.notation import Anchors
from neuclip.method.objective import log_plus


class MinibatchNormalizer(nn.Module):
    """No memory: every batch is its own normalizer, as in RGCL-g with gamma = 1.

    Args:
        epsilon: stabiliser of the objective.
    """

    direct = False
    needs_sample_ids = False

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """The batch's log-normalizers, as constants."""
        return log_plus(anchors.log_inner.detach(), self.epsilon)

    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """The same."""
        return self.estimate(anchors)

    def metrics(self) -> dict[str, Tensor | float]:
        """Nothing beyond what the loss reports."""
        return {}
