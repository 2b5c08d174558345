"""Evaluates a split of one's own: zero-shot classification, retrieval, and log-normalizers."""

import logging

from PIL import Image

from neuclip.evaluation.class_names import DATASET_TYPE
from neuclip.evaluation.embed import encode_both, require_complete, start_reading
from neuclip.evaluation.gallery import make_gallery
from neuclip.evaluation.interfaces import (
    EncodedImages,
    EncodedSplit,
    EvaluatedModel,
    EvaluationSettings,
    LogNormalizerPredictor,
    SetEvaluation,
)
from neuclip.evaluation.metrics import accuracies
from neuclip.evaluation.normalizer_error import normalizer_error
from neuclip.evaluation.outcomes import outcomes_of
from neuclip.evaluation.probes import Probes
from neuclip.evaluation.results import Gallery
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.evaluation.validation_loss import validation_loss
from neuclip.evaluation.zero_shot import (
    DATACOMP_RULES,
    OWN_RULES,
    ClassVectors,
    Rules,
    classify,
    zero_shot_metrics,
)
from neuclip.parallel import collectives

_log = logging.getLogger(__name__)


def evaluate_split(
    model: EvaluatedModel,
    split: EvaluationSplit,
    settings: EvaluationSettings,
    class_vectors: ClassVectors,
    probes: Probes | None = None,
) -> SetEvaluation:
    """Evaluates a split in one pass of the towers. All ranks call it together and share the work.

    Args:
        model: the towers, and the loss if its log-normalizers are to be evaluated.
        split: the data.
        settings: how to evaluate.
        class_vectors: computes class vectors, or has them.
        probes: trains probes for the split, if given.

    Returns:
        Metrics, outcomes of top-1 accuracy, and the gallery. A split without class names has no
        `acc1` and related keys and no outcomes; its `main_metric` is `mean_recall@1`. The same
        holds for class names without templates, which only probes can use.

    Raises:
        UserError: the split is corrupt or contradicts itself.
    """
    encoder = model.encoder
    rules = DATACOMP_RULES if split.published else OWN_RULES
    allow_damage = settings.allow_damage or split.allow_damage
    if not allow_damage:
        require_complete(split.index.damage)
    batches = start_reading(encoder, split.index, settings, title=split.title)
    vectors = None
    if split.templates:  # while the first batches are read
        vectors = class_vectors(split.classnames, split.templates)
    images, pairs = encode_both(
        encoder, batches, allow_damage=allow_damage, distinct=rules.by_image
    )
    metrics: dict[str, float] = {}
    outcomes = None
    classified = images.with_class() if split.by_label else images
    if vectors is not None:
        choices = classify(classified, vectors, split.classnames, rules)
        metrics |= zero_shot_metrics(choices)
        if len(classified) < len(images):
            metrics["num_unlabelled"] = float(len(images) - len(classified))
        outcomes = outcomes_of("mean", choices.right_at(1))
    else:
        metrics["num_samples"] = float(len(images))
    if probes is not None:
        metrics |= probes.metrics(split, classified, rules, accuracies, main="acc1")
    if images.damage:
        metrics["num_damaged"] = float(len(images.damage))
    gallery = None
    if pairs is not None:
        metrics |= _retrieval_metrics(pairs, rules, main=vectors is None)
        metrics |= _loss_metrics(pairs, model)
        metrics |= _normalizer_metrics(pairs, model, settings.seed)
        metrics |= _caption_metrics(split, images, pairs)
        gallery = _gallery(split, pairs, settings) if collectives.is_main() else None
    return SetEvaluation(metrics, outcomes, gallery, images.data_read(split.classes_digest))


def _retrieval_metrics(pairs: EncodedSplit, rules: Rules, *, main: bool) -> dict[str, float]:
    metrics = retrieve(pairs, rules.ties).metrics()
    if main and "mean_recall@1" in metrics:
        metrics["main_metric"] = metrics["mean_recall@1"]
    return metrics


def _caption_metrics(
    split: EvaluationSplit, images: EncodedImages, pairs: EncodedSplit
) -> dict[str, float]:
    """Counts that differ from the usual: several captions a sample, and captions that are cut."""
    metrics: dict[str, float] = {}
    if len(pairs) != len(images):
        metrics["num_captions"] = float(len(pairs))
    if images.truncated:
        metrics["truncated_captions"] = images.truncated / len(pairs)
        if collectives.is_main():
            _log.warning(
                "%s: %s of %s captions (%.1f %%) are longer than the text tower reads; it reads "
                "their beginning",
                split.name, f"{images.truncated:,}", f"{len(pairs):,}",
                100 * metrics["truncated_captions"],
            )  # fmt: skip
    several = sum("\n" in caption for caption in pairs.captions)
    if several and collectives.is_main():
        _log.warning(
            "%s: %s of %s captions have several lines, and each counts as one caption; if every "
            "line is a caption, write `retrieval` to %s in the split's folder",
            split.name, f"{several:,}", f"{len(pairs):,}", DATASET_TYPE,
        )  # fmt: skip
    return metrics


def _loss_metrics(encoded: EncodedSplit, model: EvaluatedModel) -> dict[str, float]:
    loss = None if model.logit_scale is None else validation_loss(encoded, model.logit_scale)
    return {} if loss is None else {"val_loss": loss}


def _normalizer_metrics(
    encoded: EncodedSplit, model: EvaluatedModel, seed: int
) -> dict[str, float]:
    loss = model.loss
    if not isinstance(loss, LogNormalizerPredictor) or not loss.predicts_log_normalizers:
        return {}
    if model.logit_scale is None:
        raise ValueError("evaluating a loss's log-normalizers needs the model's logit_scale")
    rows = encoded.first_captions().to(encoded.image_features.device)
    error = normalizer_error(
        encoded.image_features[rows],
        encoded.text_features[rows],
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
