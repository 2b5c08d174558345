"""`moco`: InfoNCE against the keys of momentum towers, those of the batch and of a queue."""

from typing import TYPE_CHECKING, ClassVar, Literal

from neuclip.catalogue.cost import momentum_contrast
from neuclip.catalogue.fields import setting
from neuclip.catalogue.infonce_queue import QueueSettings, with_queue_size
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.method.choices import BATCH_OPTIONS

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss

QUEUE_BATCHES = 128
"""Global batches in the published queue, of 512 pairs each."""
MAX_QUEUE = 65_536
"""Keys in the published queue."""


class MomentumContrastSettings(QueueSettings):
    """Momentum towers and a queue of their embeddings; the defaults are those of ALBEF."""

    TEMPERATURE_BOUNDS: ClassVar[tuple[float, float]] = (0.001, 0.5)

    name: Literal["moco"] = "moco"
    temperature: float = setting(0.07, "temperature at the start of training", ge=0.001, le=0.5)
    queue_size: int | None = setting(
        None,
        "keys of each side in the queue; none: those of 128 global batches, at most 65,536",
        ge=1,
    )
    key_momentum: float = setting(
        0.995,
        "decay per step of the moving average of the towers that encodes the keys",
        ge=0,
        lt=1,
    )

    @staticmethod
    def size_for_batch(global_batch_size: int) -> int:
        """The published number of batches, and no more than the published number of keys."""
        return min(QUEUE_BATCHES * global_batch_size, MAX_QUEUE)


def _build(settings: MomentumContrastSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.momentum_contrast import MomentumContrastLoss

    return MomentumContrastLoss(
        run.embed_dim,
        settings.queue_size,
        settings.size_for_batch,
        momentum=settings.key_momentum,
    )


METHODS = (
    MethodInfo(
        settings=MomentumContrastSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        resolve=with_queue_size,
        summary="InfoNCE against momentum towers and a queue of their embeddings (MoCo, ALBEF)",
        normalizer="the keys of the current batch, positive included, and a queue of the newest m "
        "keys",
        state="2 * m * d numbers and m sample ids, whatever the data size; and the average of the "
        "towers' weights",
        formula="""\
  momentum : W'  = key_momentum W' + (1 - key_momentum) W before each step; W' = W at the start
             k1_i, k2_i: embeddings of image and text i by the towers with the weights W'
  loss     = 1/2 * mean_i [ -e1_i . k2_i / tau
                            + log( sum_j exp(e1_i . k2_j / tau) + sum_k exp(e1_i . Q1_k / tau) ) ]
             + the same for the texts, with keys k1 and Q2
             Q: the newest m keys of earlier batches; an anchor's own pair and its groups have no
             part in its sum over Q. Keys are constants. tau stays between 0.001 and 0.5""",
        paper="He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR "
        "2020 (arXiv 1911.05722), for images and texts as the contrastive part of Li et al., Align "
        "before Fuse (ALBEF), NeurIPS 2021 (arXiv 2107.07651), without its distillation",
        cost=momentum_contrast,
    ),
)
