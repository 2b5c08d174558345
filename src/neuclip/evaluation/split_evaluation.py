"""Evaluates a split of one's own: zero-shot classification, retrieval, and log-normalizers."""

from PIL import Image

from neuclip.evaluation.embed import encode_split, require_complete, start_reading
from neuclip.evaluation.gallery import make_gallery
from neuclip.evaluation.interfaces import (
    EncodedSplit,
    EvaluatedModel,
    EvaluationSettings,
    LogNormalizerPredictor,
    SetEvaluation,
)
from neuclip.evaluation.normalizer_error import normalizer_error
from neuclip.evaluation.outcomes import outcomes_of
from neuclip.evaluation.results import Gallery
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.evaluation.zero_shot import OWN_RULES, ClassVectors, classify, zero_shot_metrics
from neuclip.parallel import collectives


def evaluate_split(
    model: EvaluatedModel,
    split: EvaluationSplit,
    settings: EvaluationSettings,
    class_vectors: ClassVectors,
) -> SetEvaluation:
    """Evaluates a split in one pass of the towers. All ranks call it together and share the work.

    Args:
        model: the towers, and the loss if its log-normalizers are to be evaluated.
        split: the data.
        settings: how to evaluate.
        class_vectors: computes class vectors, or has them.

    Returns:
        Metrics, outcomes of top-1 accuracy, and the gallery. A split without class names has no
        `acc1` and related keys and no outcomes; its `main_metric` is `mean_recall@1`.

    Raises:
        UserError: the split is corrupt or contradicts itself.
    """
    encoder = model.encoder
    if not settings.allow_damage:
        require_complete(split.index.damage)
    batches = start_reading(encoder, split.index, settings.batch_size, settings.workers)
    vectors = None
    if split.classnames:  # while the first batches are read
        vectors = class_vectors(split.classnames, split.templates)
    encoded = encode_split(encoder, batches, allow_damage=settings.allow_damage)
    metrics: dict[str, float] = {}
    outcomes = None
    if vectors is not None:
        choices = classify(encoded, vectors, split.classnames, OWN_RULES)
        metrics |= zero_shot_metrics(choices)
        outcomes = outcomes_of("mean", choices.right_at(1))
    metrics |= _retrieval_metrics(encoded, main=vectors is None)
    metrics |= _normalizer_metrics(encoded, model, settings.seed)
    gallery = _gallery(split, encoded, settings) if collectives.is_main() else None
    return SetEvaluation(metrics, outcomes, gallery)


def _retrieval_metrics(encoded: EncodedSplit, *, main: bool) -> dict[str, float]:
    metrics = retrieve(encoded, OWN_RULES.ties).metrics()
    if main:
        metrics["num_samples"] = float(len(encoded))
        if "mean_recall@1" in metrics:
            metrics["main_metric"] = metrics["mean_recall@1"]
    return metrics


def _normalizer_metrics(
    encoded: EncodedSplit, model: EvaluatedModel, seed: int
) -> dict[str, float]:
    loss = model.loss
    if not isinstance(loss, LogNormalizerPredictor) or not loss.predicts_log_normalizers:
        return {}
    if model.logit_scale is None:
        raise ValueError("evaluating a loss's log-normalizers needs the model's logit_scale")
    error = normalizer_error(
        encoded.image_features,
        encoded.text_features,
        loss,
        model.logit_scale,
        model.train_batch_size,
        seed,
    )
    return {} if error is None else error.metrics()


def _gallery(
    split: EvaluationSplit, encoded: EncodedSplit, settings: EvaluationSettings
) -> Gallery:
    def image(position: int) -> Image.Image:
        return split.index.read(position).image

    return make_gallery(
        split.name,
        encoded,
        image,
        queries=settings.gallery_queries,
        thumbnail=settings.thumbnail,
        seed=settings.seed,
    )
