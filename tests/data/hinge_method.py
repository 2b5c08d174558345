"""A method from outside the package, in one file."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.catalogue.registry import register

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class HingeSettings(MethodSettings):
    """Settings of the method."""

    name: Literal["hinge"] = "hinge"
    margin: float = setting(0.2, "how far every negative stays below its positive", ge=0)


def build(settings: HingeSettings, run: RunFacts) -> "PairLoss":
    """Makes the loss; torch is imported here, so that the help stays fast."""
    from neuclip.method.losses.pair_loss import PairLoss
    from neuclip.method.notation import Pairs

    class HingeLoss(PairLoss):
        """Sum of max(0, margin + s_ij - s_ii), over one rank's pairs."""

        def pair_loss(self, pairs: Pairs, logit_scale, logit_bias):
            """The loss of these pairs."""
            image, text = pairs.features
            similarity = image @ text.T
            excess = (settings.margin + similarity - similarity.diagonal()[:, None]).relu()
            return pairs.layout.mean(excess.mean(1)) + 0 * logit_scale

    return HingeLoss(run.embed_dim)


register(
    MethodInfo(
        settings=HingeSettings,
        build=build,
        summary="a margin between positives and negatives",
        normalizer="none",
        state="none",
        formula="  loss     = mean_ij max(0, margin + s_ij - s_ii)",
        paper="an example",
    )
)
