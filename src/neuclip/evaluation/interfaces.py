"""The vocabulary of evaluation: what a model offers, the settings, encoded data, and results.

All scores are fractions in 0..1. Log-normalizers are natural logarithms.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor, nn

from neuclip.data.progress import Progress
from neuclip.data.reading import STALL_LIMIT
from neuclip.data.samples import Damage
from neuclip.errors import UserError
from neuclip.evaluation.outcomes import Outcomes
from neuclip.evaluation.results import EvaluatedData, Gallery

RECALL_AT = (1, 5, 10)


@runtime_checkable
class ImageTextEncoder(Protocol):
    """Both towers, in evaluation mode, on a device of their choice.

    Inputs may be on the CPU; the implementation moves them.
    """

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        ...

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Turns an image into the image tower's input [3, height, width]."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [batch, 3, height, width] to unit-norm float32 features [batch, dim]."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, length] to unit-norm float32 features [batch, dim]."""
        ...

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Turns texts into int64 tokens [texts, length]; data workers get a copy."""
        ...


@runtime_checkable
class LogNormalizerPredictor(Protocol):
    """A loss with log-normalizers; `predicts_log_normalizers` tells whether it really has them."""

    @property
    def predicts_log_normalizers(self) -> bool:
        """Whether `predict_log_normalizers` may be called."""
        ...

    @property
    def epsilon(self) -> float:
        """The stabiliser inside log(epsilon + g)."""
        ...

    def full_state(self) -> AbstractContextManager[None]:
        """Gathers the full state on each rank for the block, so that each can predict alone."""
        ...

    def predict_log_normalizers(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
    ) -> Tensor:
        """Predictions for the image and text anchors of a batch, [2, batch]."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        batch_size: images, pairs or texts per forward pass.
        workers: data workers.
        stall_limit: seconds without a batch after which reading fails.
        amp: device type on which to autocast where DataComp does; if none, float32.
        allow_damage: evaluate the readable part of a corrupt set, and count the rest.
        gallery_queries: captions in the gallery of a split.
        thumbnail: longest side of the gallery's images, in pixels.
        seed: seed of the gallery's draw and of the batches for log-normalizers.
        progress: called with the set, and the number of batches done and in all.
    """

    batch_size: int = 256
    workers: int = 2
    stall_limit: float = STALL_LIMIT
    amp: Literal["cuda", "cpu"] | None = None
    allow_damage: bool = False
    gallery_queries: int = 8
    thumbnail: int = 64
    seed: int = 0
    progress: Progress | None = None

    @property
    def precision(self) -> str:
        """Name of the arithmetic in results."""
        return "fp32" if self.amp is None else "amp"

    def reporting(self, title: str) -> Callable[[int, int], None] | None:
        """The progress of one set, called with the batches done and their number."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(title, done, total)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast where it is set, to float16 on CUDA as in DataComp."""
        if self.amp is None:
            return nullcontext()
        dtype = torch.float16 if self.amp == "cuda" else torch.bfloat16
        return torch.autocast(self.amp, dtype=dtype)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        encoder: the towers.
        loss: the training loss; its log-normalizers are evaluated if it predicts them for samples
            that it was not trained on.
        logit_scale: 1 / temperature; needed with a loss.
        train_batch_size: pairs in a training step, the batch size for log-normalizers.
    """

    encoder: ImageTextEncoder
    loss: nn.Module | None = None
    logit_scale: float | None = None
    train_batch_size: int = 64


@dataclass(frozen=True)
class SetEvaluation:
    """The outcome of evaluating one set.

    Attributes:
        metrics: fractions in 0..1, counts, and errors of log-normalizers, by key.
        outcomes: outcomes per sample, for comparisons between runs; none if the set has no classes
            and is not DataComp's.
        gallery: example retrievals of a split, on the main process only.
        data: the samples that were read.
    """

    metrics: dict[str, float]
    outcomes: Outcomes | None = None
    gallery: Gallery | None = None
    data: EvaluatedData | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """A set, encoded by the image tower; one row per sample.

    Attributes:
        image_features: unit-norm features of each sample's image.
        sample_ids: position of each sample in the set's index.
        class_indices: class of each sample, -1 if it has none.
        captions: captions of each sample, any number.
        keys: key of each sample in its shard, for messages.
        image_groups: a number per image, from 0 in order of first appearance. In splits of one's
            own, samples with pixel-identical images share it.
        metadata: content of each sample's `.npy` file, if it has one.
        damage: samples that could not be read and are left out.
        fingerprint: 64 bits over the content of all samples, in any order.
        truncated: number of captions of which the text tower reads only the beginning.
    """

    image_features: Float[Tensor, "samples dim"]
    sample_ids: Int64[Tensor, " samples"]
    class_indices: Int64[Tensor, " samples"]
    captions: list[tuple[str, ...]]
    keys: list[str]
    image_groups: Int64[Tensor, " samples"]
    metadata: list[bytes | None] = field(default_factory=list[bytes | None])
    damage: tuple[Damage, ...] = ()
    fingerprint: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def with_class(self) -> "EncodedImages":
        """The samples that have a class.

        Raises:
            UserError: none has one.
        """
        kept = self.class_indices >= 0
        rows = kept.nonzero().flatten()
        if not len(rows):
            raise UserError("no readable sample of the evaluation set has a label")
        numbers = rows.tolist()
        return replace(
            self,
            image_features=self.image_features[rows.to(self.image_features.device)],
            sample_ids=self.sample_ids[rows],
            class_indices=self.class_indices[rows],
            captions=[self.captions[row] for row in numbers],
            keys=[self.keys[row] for row in numbers],
            image_groups=self.image_groups[rows].unique(return_inverse=True)[1],
            metadata=[self.metadata[row] for row in numbers] if self.metadata else [],
        )

    def data_read(self, classes_digest: int = 0) -> EvaluatedData:
        """What was read, with the digest of the class names."""
        return EvaluatedData(f"{(self.fingerprint + classes_digest) % 2**64:016x}", len(self))


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Images with their captions, encoded by both towers; one row per caption.

    Attributes:
        image_features: unit-norm features of each caption's image.
        text_features: unit-norm features of each caption.
        sample_ids: position of each caption's sample in the set's index; rows of a sample follow
            each other.
        class_indices: class of each caption's sample, -1 if it has none.
        captions: the captions.
        keys: key of each caption's sample, for messages.
        image_groups: as in `EncodedImages`.
        text_groups: a number per caption. In splits of one's own, equal captions share it.
    """

    image_features: Float[Tensor, "captions dim"]
    text_features: Float[Tensor, "captions dim"]
    sample_ids: Int64[Tensor, " captions"]
    class_indices: Int64[Tensor, " captions"]
    captions: list[str]
    keys: list[str]
    image_groups: Int64[Tensor, " captions"]
    text_groups: Int64[Tensor, " captions"]

    def __len__(self) -> int:
        return len(self.keys)

    def first_captions(self) -> Int64[Tensor, " samples"]:
        """Row of the first caption of each sample."""
        new = torch.ones(len(self), dtype=torch.bool)
        new[1:] = self.sample_ids[1:] != self.sample_ids[:-1]
        return new.nonzero().flatten()


def first_of_each(groups: Int64[Tensor, " samples"]) -> Int64[Tensor, " groups"]:
    """Position of the first sample of each group, by group number."""
    positions = torch.arange(len(groups))
    first = torch.full((int(groups.max()) + 1,), len(groups))
    return first.scatter_reduce_(0, groups, positions, "amin")


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval over a split's distinct images and captions.

    Attributes:
        image_recall: k -> share of captions with a right image among the best k.
        text_recall: k -> share of images with a right caption among the best k.
        num_images: number of distinct images.
        num_texts: number of distinct captions.
        right_images: whether a right image comes first, by caption.
        right_texts: whether a right caption comes first, by image.

    A k of at least the number of candidates is left out: recall would be 1 for any model.
    """

    image_recall: dict[int, float]
    text_recall: dict[int, float]
    num_images: int
    num_texts: int
    right_images: Bool[Tensor, " texts"] = field(repr=False, compare=False)
    right_texts: Bool[Tensor, " images"] = field(repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """The metrics by DataComp's keys."""
        record = {f"image_retrieval_recall@{k}": value for k, value in self.image_recall.items()}
        record |= {f"text_retrieval_recall@{k}": value for k, value in self.text_recall.items()}
        if 1 in self.image_recall and 1 in self.text_recall:
            record["mean_recall@1"] = (self.image_recall[1] + self.text_recall[1]) / 2
        return record


@dataclass(frozen=True)
class ErrorSummary:
    """Error of log-normalizers over all image and text anchors; bias = mean(estimate - exact)."""

    mse: float
    mae: float
    bias: float


@dataclass(frozen=True)
class NormalizerError:
    """Error of the predicted log-normalizers, and of the mini-batch estimate."""

    predicted: ErrorSummary
    minibatch: ErrorSummary
    batch_size: int

    def metrics(self) -> dict[str, float]:
        """The metrics by key."""
        record = {"normalizer_batch_size": float(self.batch_size)}
        for prefix, summary in (("", self.predicted), ("minibatch_", self.minibatch)):
            record[f"{prefix}normalizer_mse"] = summary.mse
            record[f"{prefix}normalizer_mae"] = summary.mae
            record[f"{prefix}normalizer_bias"] = summary.bias
        return record
