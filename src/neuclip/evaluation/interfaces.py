"""The vocabulary of judging: what a model must offer, what the judges read, what they answer.

All scores are fractions in 0..1. Log-normalizers are natural logarithms.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from neuclip.data.samples import Damage

RECALL_AT = (1, 5, 10)


@runtime_checkable
class ImageTextEncoder(Protocol):
    """Two towers as the judges need them: in evaluation mode, on a device of their own choice.

    Inputs may lie on the CPU; the implementation moves them.
    """

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        ...

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """What turns a picture into the image tower's input [3, height, width]."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [batch, 3, height, width] to unit-norm float32 features [batch, dim]."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, length] to unit-norm float32 features [batch, dim]."""
        ...

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """What turns texts into int64 tokens [texts, length]; reading processes get a copy."""
        ...


@runtime_checkable
class LogNormalizerPredictor(Protocol):
    """A loss that can tell the log-normalizers it trains with."""

    @property
    def epsilon(self) -> float:
        """The stabiliser inside log(epsilon + g)."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """All of its state on every process meanwhile, so that each can predict by itself."""
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
class EncodedImages:
    """A split after the image tower ran over it once.

    Attributes:
        image_features: Unit-norm features of every sample's picture.
        sample_ids: Position of every sample in the split's index.
        class_indices: Class of every sample, -1 where it has none.
        captions: Caption of every sample, empty where it has none.
        keys: Key of every sample in its shard, for messages.
        metadata: Content of every sample's `.npy`, where there is one.
        damage: What could not be read and was left out.
    """

    image_features: Float[Tensor, "samples dim"]
    sample_ids: Int64[Tensor, " samples"]
    class_indices: Int64[Tensor, " samples"]
    captions: list[str]
    keys: list[str]
    metadata: list[bytes | None] = field(default_factory=list[bytes | None])
    damage: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class EncodedSplit(EncodedImages):
    """A split after both towers ran over it once: all that the judges read.

    Attributes:
        text_features: Unit-norm features of every sample's caption.
        image_groups: Samples with pixel-identical pictures share a number; numbered from 0 in
            order of first appearance.
        text_groups: The same for captions that are equal as strings.
    """

    text_features: Float[Tensor, "samples dim"]
    image_groups: Int64[Tensor, " samples"]
    text_groups: Int64[Tensor, " samples"]


def first_of_each(groups: Int64[Tensor, " samples"]) -> Int64[Tensor, " groups"]:
    """Position of the first sample of every group, by group number."""
    positions = torch.arange(len(groups))
    first = torch.full((int(groups.max()) + 1,), len(groups))
    return first.scatter_reduce_(0, groups, positions, "amin")


@dataclass(frozen=True)
class ZeroShotResult:
    """Zero-shot classification of a split.

    Attributes:
        acc1: Share of samples whose best class is right.
        acc5: Share with a right class among the best five; none below five classes.
        mean_per_class_recall: Mean over the classes that occur of the share of their samples
            that are right (balanced accuracy).
        num_classes: Number of class names.
        num_samples: Number of samples.
        chance: Expected `acc1` of a guess.
    """

    acc1: float
    acc5: float | None
    mean_per_class_recall: float
    num_classes: int
    num_samples: int
    chance: float
    right: Bool[Tensor, " samples"] = field(repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """The flat record, by the benchmark's names."""
        record = {
            "acc1": self.acc1,
            "mean_per_class_recall": self.mean_per_class_recall,
            "num_classes": float(self.num_classes),
            "num_samples": float(self.num_samples),
            "chance": self.chance,
            "main_metric": self.acc1,
        }
        return record if self.acc5 is None else {**record, "acc5": self.acc5}


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval over a split's distinct pictures and captions.

    Attributes:
        image_recall: k -> share of captions with a right picture among the best k.
        text_recall: k -> share of pictures with a right caption among the best k.
        num_images: Number of distinct pictures.
        num_texts: Number of distinct captions.
        right_images: Whether a right picture is the best for each caption.
        right_texts: Whether a right caption is the best for each picture.

    A k that is not below the number of candidates is left out: it would be 1 for any model.
    """

    image_recall: dict[int, float]
    text_recall: dict[int, float]
    num_images: int
    num_texts: int
    right_images: Bool[Tensor, " texts"] = field(repr=False, compare=False)
    right_texts: Bool[Tensor, " images"] = field(repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """The flat record, by the benchmark's names."""
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
    """Error of the predicted log-normalizers, beside that of the mini-batch estimate."""

    predicted: ErrorSummary
    minibatch: ErrorSummary
    batch_size: int

    def metrics(self) -> dict[str, float]:
        """The flat record."""
        record = {"normalizer_batch_size": float(self.batch_size)}
        for prefix, summary in (("", self.predicted), ("minibatch_", self.minibatch)):
            record[f"{prefix}normalizer_mse"] = summary.mse
            record[f"{prefix}normalizer_mae"] = summary.mae
            record[f"{prefix}normalizer_bias"] = summary.bias
        return record
