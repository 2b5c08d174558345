"""A training step on one card as operations and bytes, and the time that they take at least.

A roofline: a kernel takes the longer of its operations at the card's rate and its bytes at the
card's bandwidth. Rates are those of data sheets, so a real step takes longer. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from neuclip.catalogue.cost import FLOAT

Rate = Literal["tensor", "float32"]

HALF = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        name: as the maker calls it.
        tensor: dense bfloat16 operations a second of the tensor cores.
        float32: operations a second in float32, without TF32.
        bandwidth: bytes a second of its memory.
    """

    name: str
    tensor: float
    float32: float
    bandwidth: float


H100 = Card("H100 SXM", 989e12, 67e12, 3.35e12)
H200 = Card("H200", 989e12, 67e12, 4.8e12)


@dataclass(frozen=True)
class Work:
    """Kernels of one kind.

    Attributes:
        flops: operations; a multiplication and an addition are two.
        moved: bytes read and written.
        rate: where the operations run.
    """

    flops: float
    moved: float
    rate: Rate = "tensor"

    def seconds(self, card: Card) -> float:
        """The longer of operations and bytes."""
        rate = card.tensor if self.rate == "tensor" else card.float32
        return max(self.flops / rate, self.moved / card.bandwidth)


Part = tuple[Work, ...]
"""Kinds of kernels that run one after the other."""


def part_seconds(part: Part, card: Card) -> float:
    """The time of a part of the step."""
    return sum(work.seconds(card) for work in part)


# --- the encoders ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer:
    """A tower, with what stands before and after its blocks.

    Attributes:
        tokens: of a sample.
        width: of a token.
        layers: number of blocks.
        further: operations of a sample outside the blocks: patches, projection.
    """

    tokens: int
    width: int
    layers: int
    further: float

    def flops(self) -> float:
        """Operations of a sample's forward pass: 24 T w^2 + 4 T^2 w a block."""
        tokens, width = self.tokens, self.width
        return self.layers * (24 * tokens * width**2 + 4 * tokens**2 * width) + self.further

    def pass_(self, batch: int, times: int) -> Part:
        """A forward pass (`times` 1), or a backward pass (2: both factors get a gradient).

        Bytes of a number of the residual stream in a block under autocast, read + written: products
        2 + 6 (queries, keys, values), 6 + 2 (attention), 2 + 2, and 2 + 8 and 8 + 2 (the MLP); then
        LayerNorm 4 + 4 and its rounding 4 + 2, twice, GELU 8 + 8, and two additions 6 + 4.
        """
        numbers = batch * self.tokens * self.width * self.layers * times
        return (
            Work(batch * self.flops() * times, 40 * numbers),
            Work(0, 64 * numbers),
        )


VIT_B_32 = (
    Transformer(50, 768, 12, 2 * 49 * 3 * 32**2 * 768 + 2 * 768 * 512),
    Transformer(77, 512, 12, 2 * 512 * 512),
)
"""Image and text tower of open_clip's ViT-B-32."""
WEIGHTS = 151_277_313


def encoders(batch: int, times: int) -> Part:
    """Both towers' forward or backward pass; the forward pass rounds the weights to bfloat16."""
    parts = [work for tower in VIT_B_32 for work in tower.pass_(batch, times)]
    rounding = (Work(0, WEIGHTS * (FLOAT + HALF)),) if times == 1 else ()
    return (*parts, *rounding)


def optimizer() -> Part:
    """The norm of the gradient, and AdamW: four numbers of a weight read, three written."""
    return Work(0, WEIGHTS * FLOAT), Work(0, 7 * WEIGHTS * FLOAT)


# --- the loss -------------------------------------------------------------------------------


def softmax(batch: int, dim: int = 512) -> Part:
    """Row blocks in one process: four products from bfloat16, some twenty passes over the logits.

    Forward: the product, the diagonal, two log-sums of three passes each. Backward: the product
    again, ten passes that make shares of it, and the gradients of both sides.
    """
    logits = batch**2
    return Work(4 * 2 * logits * dim, 4 * logits * FLOAT), Work(0, 20 * logits * FLOAT)


def reading(batch: int, prototypes: int, dim: int = 512) -> Part:
    """The prototypes' softmax for both sides: one product in float32, eight passes over it."""
    weights, numbers = 2 * batch * prototypes, 2 * prototypes * dim
    return (
        Work(2 * weights * dim, (weights + numbers) * FLOAT, "float32"),
        Work(0, (8 * weights + 4 * numbers) * FLOAT),
    )


def gradient(batch: int, prototypes: int, dim: int = 512) -> Part:
    """The gradient by the prototypes, and their step: a product, and twelve passes over them."""
    weights, numbers = 2 * batch * prototypes, 2 * prototypes * dim
    return (
        Work(2 * weights * dim, (weights + numbers) * FLOAT, "float32"),
        Work(0, 12 * numbers * FLOAT),
    )


def pool_normalizer(batch: int, size: int) -> Part:
    """`neuclip_pool`: one reading, and one product for the gradient through it."""
    through = Work(2 * 2 * batch * size * 512, 2 * batch * size * FLOAT, "float32")
    return *reading(batch, size), through


def inner_steps(batch: int, prototypes: int, steps: int) -> Part:
    """`neuclip`: its inner steps and the last reading."""
    step = (*reading(batch, prototypes), *gradient(batch, prototypes))
    return *(step * steps), *reading(batch, prototypes)
