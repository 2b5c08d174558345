"""`rgcl_queue`: the objective of `rgcl_batch` over the batch and a queue that follows it."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.building import robust_objective
from neuclip.catalogue.cost import aligned_queue
from neuclip.catalogue.fastclip import PAPER
from neuclip.catalogue.fields import setting
from neuclip.catalogue.formulas import ROBUST
from neuclip.catalogue.infonce_queue import (
    ALIGNMENT_TEXT,
    POSITIVES_TEXT,
    AlignedQueueSettings,
    queue_form,
    with_queue_size,
)
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    RHO_TEXT,
    GlobalContrastiveSettings,
    ThresholdSettings,
)
from neuclip.catalogue.neuclip import MAX_POOL
from neuclip.method.choices import BATCH_OPTIONS, QueueAlignment, QueuePositives

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss

QUEUE_BATCHES = 4
"""Global batches in the default queue: older embeddings describe the towers worse."""


class RGCLQueueSettings(ThresholdSettings, AlignedQueueSettings, GlobalContrastiveSettings):
    """Global contrastive objective over the batch and a queue that follows it."""

    name: Literal["rgcl_queue"] = "rgcl_queue"
    rho: float | Literal["auto"] = setting(2.0, RHO_TEXT, ge=0)
    queue_size: int | None = setting(
        None,
        "embeddings of each side in the queue, over all ranks; none: those of 4 global batches, at "
        "most 16,384",
        ge=1,
    )
    queue_alignment: QueueAlignment = setting("mean", ALIGNMENT_TEXT)
    queue_positives: QueuePositives = setting("anchor", POSITIVES_TEXT)

    @staticmethod
    def size_for_batch(global_batch_size: int) -> int:
        """Four batches, and no more than the largest default pool of `neuclip_pool`."""
        return min(QUEUE_BATCHES * global_batch_size, MAX_POOL)


def _build(settings: RGCLQueueSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
    from neuclip.method.normalizers.batch_and_queue import BatchAndQueueNormalizer

    normalizer = BatchAndQueueNormalizer(
        run.embed_dim, queue_form(settings), settings.epsilon, sharded=run.sharded
    )
    return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))


METHODS = (
    MethodInfo(
        settings=RGCLQueueSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        resolve=with_queue_size,
        summary="robust global contrastive objective over the batch and a queue that follows it",
        normalizer="the current batch and a queue of the newest m embeddings, as one sum",
        state="2 * m * d numbers and m sample ids, whatever the data size",
        formula=ROBUST
        + """\
  estimate : g1_i = ( sum_j exp((s_ij - s_ii)/tau) + sum_k exp((e1_i . Q1_k - s_ii)/tau) ) / (B-1+m)
             over the current batch and m texts Q1; g2_i likewise, with images Q2. It is minimised
             itself: the gradient goes through both sums
             Q: the newest m embeddings of earlier batches, as constants, shifted so that their
             mean is the batch's; an anchor's own pair and its groups have no part in its sum.
             Beside Q the positive s_ii pulls the anchor alone""",
        paper=f"this project; the objective RGCL-g of {PAPER} with cross-batch memory (Wang et "
        "al., CVPR 2020, arXiv 1912.06798) whose mean follows the batch (Ajanthan et al., Adaptive "
        "Cross Batch Normalization for Metric Learning, arXiv 2303.17127) and positives as in MoCo "
        "(arXiv 1911.05722)",
        cost=aligned_queue,
    ),
)
