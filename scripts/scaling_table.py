"""Writes the tables of docs/scaling.md: the cost of a training step for each rank, by formula.

    python scripts/scaling_table.py

The formulas of the methods are in the catalogue (`neuclip.catalogue.cost`).
`tests/distributed/test_scaling.py` compares them with the bytes and floating-point operations
counted in real runs of 2 and 4 ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from neuclip.catalogue import roofline
from neuclip.catalogue.cost import (
    FLOAT,
    Cost,
    Setup,
    aligned_queue,
    groups,
    hard_negatives,
    learned_thresholds,
    momentum_contrast,
    pool,
    prototypes,
    queue_thresholds,
    softmax_loss,
    table,
)
from neuclip.catalogue.moco import MomentumContrastSettings
from neuclip.catalogue.neuclip import MAX_POOL, POOL_BATCHES
from neuclip.catalogue.registry import METHODS
from neuclip.catalogue.rgcl_queue import RGCLQueueSettings

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
START, END = "<!-- tables: written by scripts/scaling_table.py -->\n", "<!-- /tables -->"
ROOF_START = "<!-- roofline: written by scripts/scaling_table.py -->\n"
ROOF_END = "<!-- /roofline -->"

# Assumed rates of one H100, for matrix products and its share of the network; not measured.
TOWER_FLOPS, LOSS_FLOPS, NETWORK = 400e12, 150e12, 40e9

ALPHA = 0.2
"""The share of the negatives that GloFND leaves out, as the tests of the formulas have it."""

# ViT-B/32 of open_clip at 224 pixels and 77 tokens (tested in tests/unit/test_scaling_page.py).
TOWER_WEIGHTS, TOWER_FLOPS_OF_A_PAIR = 151_277_313, 44_100_280_320


def clip_loss(setup: Setup) -> Cost:
    """open_clip's ClipLoss with --local-loss --gather-with-grad, for comparison."""
    features = 2 * setup.batch * setup.dim * FLOAT
    return Cost(features, features, messages=4, flops=softmax_loss(setup).flops)


def with_options(setup: Setup) -> Cost:
    """What batches may bring to `openclip`, beside its own cost."""
    return softmax_loss(setup) + groups(setup, kinds=3) + hard_negatives(setup)


def default_pool(setup: Setup) -> Cost:
    """`neuclip_pool` at its default size; from B = 512 on, the whole pool carries the gradient."""
    return pool(replace(setup, prototypes=min(POOL_BATCHES * setup.batch, MAX_POOL)))


def default_queue(setup: Setup) -> Cost:
    """`moco` at its default size, without the second pass of the encoders."""
    size = MomentumContrastSettings.size_for_batch(setup.batch)
    return momentum_contrast(replace(setup, prototypes=size))


def default_aligned_queue(setup: Setup) -> Cost:
    """`rgcl_queue` at its default size."""
    size = RGCLQueueSettings.size_for_batch(setup.batch)
    return aligned_queue(replace(setup, prototypes=size))


def towers(setup: Setup) -> Cost:
    """ViT-B/32 under DDP: forward and backward, gradients in float32."""
    return Cost(
        reduced=TOWER_WEIGHTS * FLOAT, messages=1, flops=setup.local * TOWER_FLOPS_OF_A_PAIR
    )


COSTS: dict[str, Callable[[Setup], Cost]] = {
    **{name: info.cost for name, info in METHODS.items() if info.cost is not None},
    "neuclip, full or union": lambda setup: softmax_loss(setup) + prototypes(setup, through=True),
    "rgcl_queue, moments": lambda setup: (
        aligned_queue(setup) + Cost(reduced=2 * setup.dim * FLOAT, messages=1)
    ),
    "fastclip_v3, GloFND": lambda setup: (
        softmax_loss(setup) + table(setup, 2) + learned_thresholds(setup)
    ),
    "neuclip_pool, GloFND": lambda setup: pool(setup) + queue_thresholds(setup, ALPHA),
}
"""Formulas by method, for `neuclip` with a gradient through its prediction, and with GloFND."""

# --- the page -------------------------------------------------------------------------------

SHOWN = {
    "ClipLoss of open_clip": clip_loss,
    "siglip": COSTS["siglip"],
    "openclip, rgcl_batch": COSTS["openclip"],
    "the same with hard negatives and groups of 3 kinds": with_options,
    "sogclr, fastclip_v0/1/3, scent": COSTS["sogclr"],
    "isogclr": COSTS["isogclr"],
    "fastclip_v2": COSTS["fastclip_v2"],
    "amorlip": COSTS["amorlip"],
    "infonce_queue": default_pool,
    "moco": default_queue,
    "rgcl_queue": default_aligned_queue,
    "neuclip_pool": default_pool,
    "neuclip": COSTS["neuclip"],
    "neuclip, full or union": COSTS["neuclip, full or union"],
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
    """Time of the products and time on the network."""
    rate = TOWER_FLOPS if name.endswith("towers") else LOSS_FLOPS
    compute, network = cost.flops / rate * 1e3, cost.sent(setup.ranks) / NETWORK * 1e3
    return f"{_number(compute)} + {_number(network)}"


def _messages() -> str:
    lines = ["| | collectives a step |", "|---|---|"]
    lines += [f"| {name} | {cost(SETUPS[0]).messages} |" for name, cost in SHOWN.items()]
    return "\n".join(lines) + "\n"


ROOFLINE_BATCH = 512
"""Pairs of a step in the table of the roofline."""


def roofline_parts(batch: int) -> dict[str, roofline.Part]:
    """The parts of a ViT-B/32 step on one card, and what each method adds to the loss."""
    pool_size = min(POOL_BATCHES * batch, MAX_POOL)
    return {
        "encoders, forward": roofline.encoders(batch, times=1),
        "encoders, backward": roofline.encoders(batch, times=2),
        "gradient norm and AdamW": roofline.optimizer(),
        "loss of `openclip`": roofline.softmax(batch),
        f"normalizer of `neuclip_pool`, {pool_size:,} embeddings": roofline.pool_normalizer(
            batch, pool_size
        ),
        "normalizer of `neuclip`, m = 4,096, T_u = 10": roofline.inner_steps(batch, 4096, 10),
    }


def _roofline() -> str:
    cards = (roofline.H100, roofline.H200)
    parts = roofline_parts(ROOFLINE_BATCH)
    heads = " | ".join(f"ms, {card.name}" for card in cards)
    lines = [f"| ViT-B/32, batch {ROOFLINE_BATCH} | GFLOP | GB | {heads} |", "|---" * 5 + "|"]
    seconds = {}
    for name, part in parts.items():
        seconds[name] = [roofline.part_seconds(part, card) * 1e3 for card in cards]
        flops, moved = (sum(getattr(w, key) for w in part) / 1e9 for key in ("flops", "moved"))
        times = " | ".join(f"{value:.3g}" for value in seconds[name])
        lines.append(f"| {name} | {_number(flops)} | {_number(moved)} | {times} |")
    common, further = list(parts)[:4], list(parts)[4:]
    wholes = {"`openclip`": common}
    wholes |= {name.split()[2].rstrip(","): [*common, name] for name in further}
    for method, names in wholes.items():
        flops = sum(work.flops for name in names for work in parts[name])
        totals = [sum(each) for each in zip(*(seconds[name] for name in names), strict=True)]
        cells = " | ".join(
            f"{total:.3g} ({flops / total * 1e3 / card.tensor:.0%})"
            for total, card in zip(totals, cards, strict=True)
        )
        label = f"whole step, {method} (FLOP utilisation)"
        lines.append(f"| {label} | {_number(flops / 1e9)} | | {cells} |")
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
    """The text of the page with the present tables."""
    for start, end, text in ((START, END, tables()), (ROOF_START, ROOF_END, f"\n{_roofline()}\n")):
        before, rest = page.split(start)
        _, after = rest.split(end)
        page = before + start + text + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
