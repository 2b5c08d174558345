"""`infonce_queue`: mini-batch InfoNCE with past embeddings as further negatives."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.cost import pool
from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    LearnedTemperatureSettings,
    MethodSettings,
    ThresholdSettings,
)
from neuclip.catalogue.neuclip import default_pool_size
from neuclip.errors import UserError, quantity
from neuclip.method.choices import BATCH_OPTIONS, QueueAlignment, QueuePositives

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss
    from neuclip.method.normalizers.embedding_queue import QueueForm

WARM_UP = 1000
"""Steps of the published warm-up."""
ALIGNMENT_TEXT = (
    "how the queue follows the batch before it is read (XBN, arXiv 2303.17127): none; mean: it is "
    "shifted so that its mean is the batch's; moments: its standard deviations are the batch's, too"
)
POSITIVES_TEXT = (
    "what a positive pulls in the queue's part of the loss, where the queue pushes the anchor "
    "alone: pair: both its embeddings; anchor: the anchor alone"
)


class QueueSettings(MethodSettings):
    """A queue of past embeddings; its default size is that of the pool of `neuclip_pool`."""

    queue_size: int | None = setting(
        None,
        "embeddings of each side in the queue, over all ranks; none: those of 128 global batches, "
        "at most 16,384",
        ge=1,
    )

    @staticmethod
    def size_for_batch(global_batch_size: int) -> int:
        """The size of the queue where the settings give none."""
        return default_pool_size(global_batch_size)


def with_queue_size(
    settings: QueueSettings, global_batch_size: int | None, before: MethodSettings | None
) -> QueueSettings:
    """The size that follows from the batch, if known; a continued run keeps its own."""
    size = settings.queue_size
    if size is None and isinstance(before, QueueSettings):
        size = before.queue_size
    if size is None and global_batch_size is not None:
        size = settings.size_for_batch(global_batch_size)
    return settings.model_copy(update={"queue_size": size})


class AlignedQueueSettings(QueueSettings):
    """A queue of embeddings by the towers themselves, which may follow the batch."""

    queue_alignment: QueueAlignment = setting("none", ALIGNMENT_TEXT)
    queue_positives: QueuePositives = setting("pair", POSITIVES_TEXT)


def queue_form(settings: AlignedQueueSettings) -> "QueueForm":
    """The queue of the settings."""
    from neuclip.method.normalizers.embedding_queue import QueueForm

    return QueueForm(
        settings.queue_size,
        settings.size_for_batch,
        settings.queue_alignment,
        settings.queue_positives,
    )


class QueueInfoNCESettings(ThresholdSettings, AlignedQueueSettings, LearnedTemperatureSettings):
    """InfoNCE over the batch and a queue of past embeddings; the defaults are the published."""

    name: Literal["infonce_queue"] = "infonce_queue"
    queue_warm_up: int | None = setting(
        None,
        "training steps in which the queue fills but has no part in the loss; none: 1,000, as "
        "published, but at most a tenth of the run",
        unit="steps",
        ge=0,
    )


def _build(settings: QueueInfoNCESettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.infonce_queue import QueueInfoNCELoss

    return QueueInfoNCELoss(
        run.embed_dim,
        queue_form(settings),
        warm_up=_warm_up(settings, run),
        sharded=run.sharded,
    )


def _warm_up(settings: QueueInfoNCESettings, run: RunFacts) -> int:
    """Steps without the queue.

    Raises:
        UserError: the run has no step with it.
    """
    steps, total = settings.queue_warm_up, run.total_steps
    if steps is None:
        return WARM_UP if total is None else min(WARM_UP, total // 10)
    if total is not None and steps >= total:
        raise UserError(
            f"method 'infonce_queue': queue_warm_up {steps} leaves no step of the run "
            f"({quantity(total, 'step')}) with the queue: choose less, or --method openclip"
        )
    return steps


METHODS = (
    MethodInfo(
        settings=QueueInfoNCESettings,
        build=_build,
        takes=BATCH_OPTIONS,
        resolve=with_queue_size,
        summary="mini-batch InfoNCE with the newest past embeddings as further negatives (XBM)",
        normalizer="the current batch, positive included, and a queue of the newest m embeddings",
        state="2 * m * d numbers and m sample ids, whatever the data size",
        formula="""\
  loss     = 1/2 * mean_i [ -s_ii/tau + log( sum_j exp(s_ij/tau) + sum_k exp(e1_i . Q1_k / tau) ) ]
             + the same for the texts, with images Q2
             Q: the newest m embeddings of earlier batches, as constants; an anchor's own pair and
             its groups have no part in its sum. In the first queue_warm_up steps Q fills and is
             left out; queue_alignment and queue_positives are those of rgcl_queue, off here""",
        paper="Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020 "
        "(arXiv 1912.06798), with the loss of CLIP (arXiv 2103.00020)",
        cost=pool,
    ),
)
