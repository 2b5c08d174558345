"""What a training step costs each rank, by formula: `python scripts/scaling_table.py`.

Writes the tables of docs/scaling.md. `tests/distributed/test_scaling.py` holds the formulas to the
bytes and floating-point operations counted in real runs of 2 and 4 processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
START, END = "<!-- tables: written by scripts/scaling_table.py -->\n", "<!-- /tables -->"

FLOAT, DOUBLE, INTEGER = 4, 8, 8
"""Bytes of a number."""

# Assumed rates of one H100, its matmuls and its share of the network: nothing here is measured.
TOWER_FLOPS, LOSS_FLOPS, NETWORK = 400e12, 150e12, 40e9

# ViT-B/32 of open_clip at 224 pixels and 77 tokens (held by tests/unit/test_scaling_page.py).
TOWER_WEIGHTS, TOWER_FLOPS_OF_A_PAIR = 151_277_313, 44_100_280_320


@dataclass(frozen=True)
class Setup:
    """A run.

    Attributes:
        ranks: processes, K.
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


# --- the parts of a step --------------------------------------------------------------------


def softmax_loss(setup: Setup, told: int = 2) -> Cost:
    """Log g^ and its gradient: features gathered once, `told` numbers a side in the backward.

    Three products of local anchors and all candidates, for each side.
    """
    features = 2 * setup.batch * setup.dim * FLOAT
    numbers = 2 * setup.batch * told * FLOAT
    products = 2 * 3 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=features + numbers, messages=2, flops=products)


def sigmoid_loss(setup: Setup) -> Cost:
    """Texts gathered, their gradients scattered; three products."""
    texts = setup.batch * setup.dim * FLOAT
    products = 3 * 2 * setup.local * setup.batch * setup.dim
    return Cost(gathered=texts, scattered=texts, messages=2, flops=products)


def clip_loss(setup: Setup) -> Cost:
    """open_clip's ClipLoss with --local-loss --gather-with-grad, for comparison."""
    features = 2 * setup.batch * setup.dim * FLOAT
    return Cost(features, features, messages=4, flops=softmax_loss(setup).flops)


def table(setup: Setup, rows: int) -> Cost:
    """Ids and `rows` numbers of the batch's samples, told to all ranks."""
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


def default_pool(setup: Setup) -> Cost:
    """The same at the size that `neuclip` chooses by itself; from B = 512 on all carry it."""
    return pool(replace(setup, prototypes=min(128 * setup.batch, 16_384)))


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


def towers(setup: Setup) -> Cost:
    """ViT-B/32 under DDP: forward and backward, gradients in float32."""
    return Cost(
        reduced=TOWER_WEIGHTS * FLOAT, messages=1, flops=setup.local * TOWER_FLOPS_OF_A_PAIR
    )


COSTS: dict[str, Callable[[Setup], Cost]] = {
    "openclip": softmax_loss,
    "siglip": sigmoid_loss,
    "rgcl_batch": softmax_loss,
    "sogclr": lambda setup: softmax_loss(setup) + table(setup, 2),
    "isogclr": lambda setup: softmax_loss(setup, told=3) + table(setup, 2) + table(setup, 4),
    "fastclip_v0": lambda setup: softmax_loss(setup) + table(setup, 2),
    "fastclip_v1": lambda setup: softmax_loss(setup) + table(setup, 2),
    "fastclip_v2": lambda setup: softmax_loss(setup, told=3) + table(setup, 2) + table(setup, 6),
    "fastclip_v3": lambda setup: softmax_loss(setup) + table(setup, 2),
    "scent": lambda setup: softmax_loss(setup) + table(setup, 2),
    "amorlip": lambda setup: softmax_loss(setup) + networks(setup),
    "neuclip": lambda setup: softmax_loss(setup) + prototypes(setup, through=False),
    "neuclip, full or union": lambda setup: softmax_loss(setup) + prototypes(setup, through=True),
    "neuclip, pool": pool,
}
"""By method; `neuclip` stands for `gradient: detached`."""

# --- the page -------------------------------------------------------------------------------

SHOWN = {
    "ClipLoss of open_clip": clip_loss,
    "siglip": COSTS["siglip"],
    "openclip, rgcl_batch": COSTS["openclip"],
    "sogclr, fastclip_v0/1/3, scent": COSTS["sogclr"],
    "isogclr": COSTS["isogclr"],
    "fastclip_v2": COSTS["fastclip_v2"],
    "amorlip": COSTS["amorlip"],
    "neuclip (its default)": default_pool,
    "neuclip, trained, detached": COSTS["neuclip"],
    "neuclip, trained, full or union": COSTS["neuclip, full or union"],
    "ViT-B/32 towers": towers,
}
SETUPS = [
    Setup(ranks, batch)
    for ranks, batch in [
        (8, 4096),
        (8, 32768),
        (64, 32768),
        (64, 262144),
        (256, 65536),
        (1024, 65536),
        (1024, 262144),
    ]
]


def _rows(label: str, cell: Callable[[Cost, Setup, str], str]) -> str:
    heads = [f"K {setup.ranks:,}, B {setup.batch:,}" for setup in SETUPS]
    lines = [f"| {label} | {' | '.join(heads)} |", "|---" * (len(SETUPS) + 1) + "|"]
    for name, cost in SHOWN.items():
        cells = [cell(cost(setup), setup, name) for setup in SETUPS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(cost: Cost, setup: Setup, name: str) -> str:
    """Time of the products plus time on the network."""
    rate = TOWER_FLOPS if name.endswith("towers") else LOSS_FLOPS
    compute, network = cost.flops / rate * 1e3, cost.sent(setup.ranks) / NETWORK * 1e3
    return f"{_number(compute)} + {_number(network)}"


def _messages() -> str:
    lines = ["| | collectives a step |", "|---|---|"]
    lines += [f"| {name} | {cost(SETUPS[0]).messages} |" for name, cost in SHOWN.items()]
    return "\n".join(lines) + "\n"


def tables() -> str:
    """The tables, as Markdown."""
    parts = [
        _rows("MB sent", lambda cost, setup, _: _number(cost.sent(setup.ranks) / 1e6)),
        _rows("GFLOP", lambda cost, _setup, _: _number(cost.flops / 1e9)),
        _rows("ms: products + network", _milliseconds),
        _messages(),
    ]
    return "\n" + "\n".join(parts) + "\n"


def with_tables(page: str) -> str:
    """The page's text with the tables as they should be."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return before + START + tables() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
