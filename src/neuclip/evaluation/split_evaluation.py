"""All judges over one split: the towers run once."""

import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split, require_whole, start_reading
from neuclip.evaluation.gallery import make_gallery
from neuclip.evaluation.interfaces import EncodedSplit, ImageTextEncoder, LogNormalizerPredictor
from neuclip.evaluation.normalizer_error import normalizer_error
from neuclip.evaluation.outcomes import outcomes_of, write_outcomes
from neuclip.evaluation.results import Gallery, write_gallery
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.splits import EvaluationSplit, open_split
from neuclip.evaluation.zero_shot import class_vectors, classify
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How to judge.

    Attributes:
        batch_size: Pairs (and prompts) per forward pass.
        workers: Reading processes.
        normalizer_batch_size: Pairs in a batch when judging log-normalizers: the training batch.
        allow_damage: Judge what is left of a damaged split instead of refusing it.
        gallery_queries: Captions in the gallery.
        thumbnail: Longest side of the gallery's pictures, in pixels.
        seed: Seed of the gallery's draw and of the normalizers' batches.
    """

    batch_size: int = 256
    workers: int = 2
    normalizer_batch_size: int = 64
    allow_damage: bool = False
    gallery_queries: int = 8
    thumbnail: int = 64
    seed: int = 0


def judge_split(
    encoder: ImageTextEncoder,
    split: Path | EvaluationSplit,
    settings: JudgeSettings,
    loss: nn.Module | None = None,
    logit_scale: float | None = None,
    gallery: Path | None = None,
) -> dict[str, float]:
    """Zero-shot classification, retrieval, and the error of the log-normalizers.

    Several processes share the work out; all call this together, and all get the record.

    Args:
        encoder: The towers, in evaluation mode.
        split: A split or its folder.
        settings: How to judge.
        loss: The training loss. One that predicts no log-normalizers, or none for samples that it
            was not trained on, leaves the keys `normalizer_*` and `minibatch_normalizer_*` out.
        logit_scale: 1 / temperature; needed with a loss.
        gallery: Write the gallery to this file, and the outcomes of the samples beside it.

    Returns:
        The flat record, fractions in 0..1. A split without class names has no `acc1` and its
        like; its `main_metric` is `mean_recall@1`.

    Raises:
        UserError: the split is not whole or contradicts itself.
    """
    if isinstance(split, Path):
        split = open_split(split)
    if not settings.allow_damage:
        require_whole(split.index.damage)
    batches = start_reading(encoder, split.index, settings.batch_size, settings.workers)
    vectors: Tensor | None = None
    if split.classnames:  # while the first batches are read
        vectors = class_vectors(encoder, split.classnames, split.templates, settings.batch_size)
    encoded = encode_split(encoder, batches, allow_damage=settings.allow_damage)
    metrics: dict[str, float] = {}
    if vectors is not None:
        found = classify(encoded, vectors, split.classnames)
        metrics |= found.metrics()
        if gallery is not None and collectives.is_main():
            outcomes = outcomes_of("mean", found.right)
            write_outcomes(RunFolder(gallery.parents[1]).split_outcomes(split.name), outcomes)
    metrics |= _retrieval_metrics(encoded, main=not split.classnames)
    if loss is not None:
        metrics |= _normalizer_metrics(encoded, loss, logit_scale, settings)
    if gallery is not None and collectives.is_main():
        write_gallery(gallery, _gallery(split, encoded, settings))
    return metrics


def _retrieval_metrics(encoded: EncodedSplit, *, main: bool) -> dict[str, float]:
    metrics = retrieve(encoded).metrics()
    if main:
        metrics["num_samples"] = float(len(encoded))
        if "mean_recall@1" in metrics:
            metrics["main_metric"] = metrics["mean_recall@1"]
    return metrics


def _normalizer_metrics(
    encoded: EncodedSplit, loss: nn.Module, logit_scale: float | None, settings: JudgeSettings
) -> dict[str, float]:
    if not isinstance(loss, LogNormalizerPredictor):
        return {}
    if logit_scale is None:
        raise ValueError("judging a loss's log-normalizers needs the model's logit_scale")
    try:
        error = normalizer_error(
            encoded.image_features,
            encoded.text_features,
            loss,
            logit_scale,
            settings.normalizer_batch_size,
            settings.seed,
        )
    except UserError as reason:
        if collectives.is_main():
            _log.info("log-normalizers are not judged: %s", reason)
        return {}
    return {} if error is None else error.metrics()


def _gallery(split: EvaluationSplit, encoded: EncodedSplit, settings: JudgeSettings) -> Gallery:
    def picture(position: int) -> Image.Image:
        return split.index.read(position).image

    return make_gallery(
        split.name,
        encoded,
        picture,
        queries=settings.gallery_queries,
        thumbnail=settings.thumbnail,
        seed=settings.seed,
    )
