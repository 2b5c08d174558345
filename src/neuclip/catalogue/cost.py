"""What a training step costs each rank, by formula. Imports no torch.

`tests/distributed/test_scaling.py` compares the formulas with the bytes and floating-point
operations counted in real runs of 2 and 4 processes.
"""

import math
from dataclasses import dataclass, replace

FLOAT, DOUBLE, INTEGER = 4, 8, 8
"""Bytes of a number."""


@dataclass(frozen=True)
class Setup:
    """A run.

    Attributes:
        ranks: number of ranks, K.
        batch: global batch, B; a multiple of K.
        dim: width of the embeddings, d.
        prototypes: of each side, m.
        prototype_steps: inner steps of NeuCLIP, T_u.
        network_steps: inner steps of AmorLIP.
        hidden: width of AmorLIP's networks.
    """

    ranks: int
    batch: int
    dim: int = 512
    prototypes: int = 4096
    prototype_steps: int = 10
    network_steps: int = 3
    hidden: int = 512

    @property
    def local(self) -> int:
        """Pairs of a rank."""
        return self.batch // self.ranks


@dataclass(frozen=True)
class Cost:
    """Of one rank and step.

    Attributes:
        gathered: bytes of all-gathers, counted whole.
        scattered: bytes of reduce-scatters, counted whole.
        reduced: bytes of all-reduces.
        messages: collectives.
        flops: of matrix products; a multiplication and an addition are two.
    """

    gathered: int = 0
    scattered: int = 0
    reduced: int = 0
    messages: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.gathered + other.gathered,
            self.scattered + other.scattered,
            self.reduced + other.reduced,
            self.messages + other.messages,
            self.flops + other.flops,
        )

    def sent(self, ranks: int) -> float:
        """Bytes a rank sends with ring algorithms."""
        return (self.gathered + self.scattered + 2 * self.reduced) * (ranks - 1) / ranks


# --- the parts of a step ---


def softmax_loss(setup: Setup, sent: int = 2) -> Cost:
    """Log g^ and its gradient: features gathered once, `sent` numbers a side in the backward.

    Three products of local anchors and all candidates, for each side.
    """
    features = 2 * setup.batch * setup.dim * FLOAT
    numbers = 2 * setup.batch * sent * FLOAT
    products = 2 * 3 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=features + numbers, messages=2, flops=products)


def sigmoid_loss(setup: Setup) -> Cost:
    """Texts gathered, their gradients scattered; three products."""
    texts = setup.batch * setup.dim * FLOAT
    products = 3 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=texts, scattered=texts, messages=2, flops=products)


def groups(setup: Setup, kinds: int) -> Cost:
    """Group ids of all pairs, beside a softmax or sigmoid loss; comparisons cost no products."""
    return Cost(gathered=setup.batch * kinds * INTEGER, messages=1)


def hard_negatives(setup: Setup) -> Cost:
    """Hard negatives of a softmax loss: features, a log-sum and weight per image; five products.

    One in the forward pass, and two each for the gradients of the images and of the captions.
    """
    features, numbers = setup.batch * setup.dim * FLOAT, 2 * setup.batch * FLOAT
    products = 5 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=features + numbers, messages=2, flops=products)


def table(setup: Setup, rows: int) -> Cost:
    """Ids and `rows` numbers of the batch's samples, sent to all ranks."""
    return Cost(gathered=setup.batch * (INTEGER + rows * FLOAT), messages=2)


def prototypes(setup: Setup, *, through: bool) -> Cost:
    """Readings and steps of the prototype network; `through`: alpha has a gradient."""
    own = -(-setup.prototypes // setup.ranks)  # of the rank with the most
    steps = setup.prototype_steps
    product = 2 * 2 * setup.batch * setup.dim * own  # of both sides
    sums, norms = 2 * setup.batch * DOUBLE, 2 * FLOAT
    return Cost(
        gathered=2 * setup.batch * FLOAT,
        scattered=2 * setup.batch * setup.dim * FLOAT if through else 0,
        reduced=(steps + 1) * sums + steps * norms,
        messages=1 + 2 * steps + 1 + through,
        flops=(2 * steps + 1 + through) * product,
    )


def pool(setup: Setup) -> Cost:
    """The newest embeddings as prototypes, untrained, with ids; alpha has a gradient."""
    read = prototypes(replace(setup, prototype_steps=0), through=True)
    return softmax_loss(setup) + read + Cost(gathered=setup.batch * INTEGER)


def aligned_queue(setup: Setup) -> Cost:
    """A pool of that size, whose mean over all ranks is summed in another message."""
    return pool(setup) + Cost(reduced=2 * setup.dim * FLOAT, messages=1)


def momentum_contrast(setup: Setup) -> Cost:
    """Keys and ids gathered once; three products of local anchors and all keys, for each side.

    Every rank keeps the whole queue.
    """
    keys = 2 * setup.batch * setup.dim * FLOAT
    columns = setup.batch + setup.prototypes
    products = 2 * 3 * 2 * setup.local * columns * setup.dim
    return Cost(gathered=keys + setup.batch * INTEGER, messages=2, flops=products)


def learned_thresholds(setup: Setup) -> Cost:
    """GloFND's table: negatives are counted before and after the step on the thresholds."""
    return table(setup, 6) + _thresholds(setup, counts=2)


def queue_thresholds(setup: Setup, alpha: float) -> Cost:
    """GloFND's quantiles over a pool or queue: its largest similarities, sent to all ranks.

    Ids are gathered for them, and how many embeddings an anchor keeps is summed over ranks, before
    its threshold and after.
    """
    own = -(-setup.prototypes // setup.ranks)  # of the rank with the most
    most = math.floor(alpha * setup.prototypes) + 1
    largest = 2 * setup.batch * most * setup.ranks * FLOAT
    return _thresholds(setup, counts=1) + Cost(
        gathered=setup.batch * INTEGER + largest,
        reduced=3 * setup.batch * FLOAT,
        messages=4,
        flops=2 * 2 * setup.batch * setup.dim * own,
    )


def _thresholds(setup: Setup, counts: int) -> Cost:
    """Thresholds sent to all ranks; a count of what is above them is a product a side.

    How many anchors of each side have a negative left is summed over ranks.
    """
    products = counts * 2 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=2 * setup.batch * FLOAT, reduced=2 * FLOAT, messages=2, flops=products)


def networks(setup: Setup) -> Cost:
    """AmorLIP's: steps with gradient, and two answers of the averaged and earlier networks."""
    dim, hidden, steps = setup.dim, setup.hidden, setup.network_steps
    weights = 2 * (2 * dim * hidden + 3 * hidden + 4 * dim + 1)
    answer = 2 * 2 * setup.local * (2 * dim * hidden + dim)
    by_input = 2 * 2 * setup.local * (dim * hidden + dim)  # not by the features
    return Cost(
        reduced=steps * weights * FLOAT,
        messages=steps,
        flops=(steps + 2) * answer + steps * (answer + by_input),
    )
