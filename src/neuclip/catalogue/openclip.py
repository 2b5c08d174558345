"""`openclip`: mini-batch InfoNCE, as open_clip's ClipLoss."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.cost import softmax_loss
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    LearnedTemperatureSettings,
    LearnedThresholdSettings,
)
from neuclip.method.choices import BATCH_OPTIONS

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class OpenCLIPSettings(LearnedThresholdSettings, LearnedTemperatureSettings):
    """Mini-batch InfoNCE, as open_clip's ClipLoss."""

    name: Literal["openclip"] = "openclip"


def _build(_: OpenCLIPSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.infonce import InfoNCELoss

    return InfoNCELoss(run.embed_dim)


METHODS = (
    MethodInfo(
        settings=OpenCLIPSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        summary="mini-batch InfoNCE with a learnable temperature (open_clip's ClipLoss)",
        normalizer="the current batch, positive included",
        state="none",
        formula="""\
  loss     = 1/2 * mean_i [ -s_ii/tau + log sum_j exp(s_ij/tau) ]  + the same for the texts
             (the family's member with the batch normalizer and eps = 1/(B-1), without tau)""",
        paper="Radford et al., Learning Transferable Visual Models From Natural Language "
        "Supervision, ICML 2021 (arXiv 2103.00020)",
        cost=softmax_loss,
    ),
)
