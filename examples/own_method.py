"""A method of your own in one file, outside the package.

    export NEUCLIP_METHODS=examples/own_method.py
    neuclip methods hinge
    neuclip train --method hinge --margin 0.3 --train-data photos --smoke

CONTRIBUTING.md explains the parts.
"""

from typing import TYPE_CHECKING, Literal

import neuclip
from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings

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
        """Mean of max(0, margin + s_ij - s_ii) over each rank's pairs; uses no temperature."""

        learns_temperature = False

        def pair_loss(self, pairs: Pairs, logit_scale, logit_bias):
            """This rank's part of the loss."""
            image, text = pairs.features
            similarity = image @ text.T
            excess = (settings.margin + similarity - similarity.diagonal()[:, None]).relu()
            return pairs.layout.mean(excess.mean(1))

    return HingeLoss(run.embed_dim)


neuclip.register(
    MethodInfo(
        settings=HingeSettings,
        build=build,
        summary="a margin between positives and negatives",
        normalizer="none",
        state="none",
        formula="  loss     : mean_ij max(0, margin + s_ij - s_ii)",
        paper="an example",
    )
)
