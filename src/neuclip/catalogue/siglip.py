"""`siglip`: the pairwise sigmoid loss, as open_clip's SigLipLoss."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.cost import sigmoid_loss
from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.method.choices import BATCH_OPTIONS

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class SigLIPSettings(MethodSettings):
    """Pairwise sigmoid loss, as open_clip's SigLipLoss."""

    name: Literal["siglip"] = "siglip"
    temperature: float = setting(0.1, "temperature at the start of training", gt=0, le=1)
    logit_bias: float = setting(-10.0, "learnable bias of the logits at the start of training")


def _build(settings: SigLIPSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.sigmoid import SigmoidLoss

    return SigmoidLoss(run.embed_dim, settings.logit_bias)


METHODS = (
    MethodInfo(
        settings=SigLIPSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        summary="pairwise sigmoid loss with a learnable bias (open_clip's SigLipLoss)",
        normalizer="none",
        state="none",
        formula="""\
  loss     = mean_i sum_j log(1 + exp(-z_ij (s_ij/tau + bias))),  z_ii = 1, z_ij = -1 otherwise""",
        paper="Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023 "
        "(arXiv 2303.15343)",
        spelling={"siglip": True},
        cost=sigmoid_loss,
    ),
)
