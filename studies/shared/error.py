"""The error of a checkpoint's log-normalizers over the training data.

Each method's log-normalizers, from its state in the checkpoint, are compared with log(eps + g_i)
over *all* n training pairs. The state is the moving average of a sample, the prediction of a
network or pool, or the estimate from a batch. Anchors are a fixed random subset; candidates are all
pairs.
"""

from pathlib import Path

import torch
from torch import Tensor

from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.method.losses.individual import IndividualContrastiveLoss
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.objective import log_plus
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import RestoredRun, load_run
from neuclip.training.training_data import read_index

ANCHORS = 4096
ROWS = 256
_EXCLUDED = -1e30
"""The logit of the positive. Minus infinity times its weight of 0 would be NaN."""


def training_error(folder: Path, epoch: int | None = None) -> dict[str, float]:
    """MSE, MAE and bias of the method's log-normalizers and of the mini-batch estimates.

    Also the temperature, and the mean divergence of the softmax over negatives from uniform
    (`divergence`, in nats): at the stationary point of the learned temperature it is rho.

    Args:
        folder: of the run.
        epoch: of the checkpoint; None: the newest.
    """
    run = load_run(CheckpointChoice(folder, epoch=epoch), "cpu")
    features, ids = encode_training_pairs(run)
    error = error_of(
        features, ids, run.loss, run.clip.logit_scale, run.checkpoint.global_batch_size
    )
    return {"epoch": float(run.checkpoint.epoch), "temperature": 1 / run.clip.logit_scale, **error}


def error_of(
    features: Tensor, ids: Tensor, loss: PairLoss, scale: float, batch: int, anchors: int = ANCHORS
) -> dict[str, float]:
    """The error at random anchors, in batches as in training.

    Args:
        features: embeddings of all training pairs, [2, n, d].
        ids: sample ids of the pairs.
        loss: the method with its state.
        scale: 1 / temperature; methods with individual temperatures are measured at these.
        batch: pairs in a batch.
        anchors: number of anchors.
    """
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = order[: min(anchors, len(order)) // batch * batch]
    scales = torch.full((2, len(chosen)), scale, dtype=torch.float64)
    if isinstance(loss, IndividualContrastiveLoss):
        scales = 1 / loss.temperature.read(ids[chosen])
    log_g, divergence = softmax_of(features, chosen, scales)
    exact = log_plus(log_g, loss.epsilon)
    predicted, minibatch = [], []
    for rows, own_scales in zip(chosen.split(batch), scales.split(batch, 1), strict=True):
        own = features[:, rows]
        minibatch.append(exact_of(own, torch.arange(batch), own_scales, loss.epsilon))
        if loss.predicts_log_normalizers:
            scale_tensor = torch.tensor(scale)
            predicted.append(loss.predict_log_normalizers(*own, scale_tensor, ids[rows]))
    found = {"anchors": float(len(chosen)), "divergence": round(float(divergence.mean()), 5)}
    found |= summary("minibatch_", torch.cat(minibatch, 1) - exact)
    return found | (summary("", torch.cat(predicted, 1) - exact) if predicted else {})


def encode_training_pairs(run: RestoredRun, train_data: str | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings of all training pairs, [2, n, d], and their sample ids.

    Args:
        run: the run whose encoders are used.
        train_data: training data, if not the run's own.
    """
    source = read_index(run.config, train_data or str(run.config.data.train_data))
    encoded = encode_split(
        run.encoder, start_reading(run.encoder, source, EvaluationSettings(workers=0))
    )
    features = torch.stack([encoded.image_features, encoded.text_features])
    return features, encoded.sample_ids


def exact_of(features: Tensor, anchors: Tensor, scale: float | Tensor, epsilon: float) -> Tensor:
    """log(eps + g) of anchors over all candidates except the positive: [2, anchors], float64.

    Args:
        features: images, texts: [2, n, d].
        anchors: positions of the anchors.
        scale: 1 / temperature, for all anchors or for each one: [2, anchors].
        epsilon: stabiliser.
    """
    return log_plus(softmax_of(features, anchors, scale)[0], epsilon)


def softmax_of(features: Tensor, anchors: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of anchors over all candidates except the positive, in two numbers an anchor.

    Args:
        features: images, texts: [2, n, d].
        anchors: positions of the anchors.
        scale: 1 / temperature, for all anchors or for each one: [2, anchors].

    Returns:
        log g, and the KL divergence of the softmax from the uniform distribution, in nats: [2,
        anchors] each, float64.
    """
    count = features.shape[1]
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(2, len(anchors))
    positive = (features[0, anchors] * features[1, anchors]).double().sum(-1) * scales
    log_count = torch.tensor(float(count - 1)).double().log()
    sums, divergences = [], []
    for side in (0, 1):
        for rows, own in zip(anchors.split(ROWS), scales[side].split(ROWS), strict=True):
            logits = (features[side, rows] @ features[1 - side].T).double() * own[:, None]
            logits[torch.arange(len(rows)), rows] = _EXCLUDED
            log_sum = torch.logsumexp(logits, 1)
            mean = ((logits - log_sum[:, None]).exp_() * logits).sum(1)
            sums.append(log_sum)
            divergences.append(mean - log_sum + log_count)
    log_sum = torch.cat(sums).view(2, -1)
    return log_sum - positive - log_count, torch.cat(divergences).view(2, -1)


def summary(prefix: str, error: Tensor) -> dict[str, float]:
    """MSE, MAE and bias of errors, as metrics with a prefix."""
    return {
        f"{prefix}mse": round(float(error.square().mean()), 5),
        f"{prefix}mae": round(float(error.abs().mean()), 5),
        f"{prefix}bias": round(float(error.mean()), 5),
    }
