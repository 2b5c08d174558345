"""The runs of the study of fine-tuning: what varies, and in which order.

Every run starts from the same model, trained on icons by InfoNCE (the stand-in for published
weights), and is fine-tuned on pairs of the emoji of nine vendors. Accuracy on icons of unseen
styles shows what it forgets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

METHODS = ("openclip", "siglip", "fastclip_v3", "neuclip", "neuclip_pool")
SEEDS = (0, 1, 2)
PAIRS = (1_000, 5_000, 10_000)
DUPLICATES = (0, 50, 90)
"""Percentage of the pairs whose caption is the bare name, which other pairs share."""
RATES = (3e-4, 1e-3)
RATE = 1e-3
"""The rate of the stages after the first."""
WARM = 32
"""Batches of a warm start."""
MORE = ("--glofnd-alpha 0.01", "--distill-start 1")
"""Remedies of one option: false negatives by similarity, and what stays near the weights."""
MIXED = ("neuclip_pool", "openclip")
BLENDED = ((2_500, 50, 32, RATE), (10_000, 50, 32, RATE))
"""Pairs, duplicates, batch and rate of the runs whose weights are mixed with the starting ones."""
LION = {2e-4: "--opt lion --wd 0.5", 1e-4: "--opt lion --wd 1", 3e-5: "--opt lion --wd 3"}
"""Rates of Lion, a fifth to a thirtieth of AdamW's, with as much decay a step as AdamW's."""
EPOCHS = {1_000: 8, 2_500: 4, 5_000: 3, 10_000: 2}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: purpose of the run.
        method: its name in the catalogue.
        pairs: number of training pairs.
        duplicates: percentage of them with a shared caption.
        batch: pairs per step.
        lr: peak learning rate.
        rho: `--rho`; empty: the method's default.
        warm: `--warm-start-steps`.
        mask: whether false negatives are masked.
        apart: whether batches hold no duplicates.
        more: further options of `neuclip train`, in one string.
        seed: of the run and of the pairs chosen.
        weights: name of the starting weights: `start` ends at a temperature of about 0.06; `sharp`
            goes on from it at 0.01, the temperature of most published weights.
    """

    stage: str
    method: str
    pairs: int = 5_000
    duplicates: int = 50
    batch: int = 32
    lr: float = 1e-4
    rho: str = ""
    warm: int = 0
    mask: bool = False
    apart: bool = False
    more: str = ""
    seed: int = 0
    weights: str = "start"

    @property
    def name(self) -> str:
        """Tells the cell from all others; the same for equal runs of different stages."""
        parts = [
            self.method,
            f"n{self.pairs}",
            f"d{self.duplicates}",
            f"b{self.batch}",
            f"lr{self.lr:g}",
            f"rho{self.rho}" if self.rho else "",
            f"warm{self.warm}" if self.warm else "",
            "mask" if self.mask else "",
            "apart" if self.apart else "",
            self.more.replace("--", "").replace(" ", ""),
            f"seed{self.seed}",
            self.weights if self.weights != "start" else "",
        ]
        return "_".join(filter(None, parts))


def has_rho(method: str) -> bool:
    """Whether the method learns its temperature against rho."""
    return method in {"fastclip_v3", "neuclip", "neuclip_pool"}


def plan() -> Iterator[Cell]:
    """The cells, the most useful first; a prefix of the plan is a study. None occurs twice."""
    seen: set[str] = set()
    for cell in stages():
        if cell.name not in seen:
            seen.add(cell.name)
            yield cell


def stages() -> Iterator[Cell]:
    """The cells of all stages; equal runs of different stages occur in each."""
    for stage in (_rates, _remedies, _few_pairs, _batches, _sharp, _optimisers, _more_pairs):
        yield from stage()


def _rates() -> Iterator[Cell]:
    """How fast, and which temperature rule: half of the pairs are duplicates, one seed."""
    for method, lr in product(("openclip", "neuclip_pool"), RATES):
        base = Cell("rate", method, lr=lr)
        yield base
        if has_rho(method):
            yield _usual(base)
    for method, lr in product(("siglip", "fastclip_v3", "neuclip"), RATES):
        yield _usual(Cell("rate", method, lr=lr))


def _remedies() -> Iterator[Cell]:
    """What each remedy is worth, one at a time and together."""
    for seed, method in product(SEEDS, MIXED):
        base = _usual(Cell("remedies", method, 2_500, lr=RATE, seed=seed))
        yield base
        yield replace(base, mask=True)
        yield replace(base, apart=True)
        yield replace(base, rho="", warm=0 if base.warm else WARM)
        for more in MORE:
            yield replace(base, more=more)


def _few_pairs() -> Iterator[Cell]:
    """All methods over duplicates, with the mask where most pairs share their caption.

    Where none does, the mask leaves nothing out: one seed shows what rounding alone changes.
    """
    for seed, duplicates, method in product(SEEDS, DUPLICATES, METHODS):
        base = _usual(Cell("methods", method, 1_000, duplicates, lr=RATE, seed=seed))
        yield base
        if duplicates == 90 or (duplicates, seed) == (0, 0):
            yield replace(base, mask=True)


def _batches() -> Iterator[Cell]:
    for seed, batch, method in product(SEEDS, (16, 64), METHODS):
        yield _usual(Cell("batch", method, 1_000, batch=batch, lr=RATE, seed=seed))


def _sharp() -> Iterator[Cell]:
    """Weights of temperature 0.01: rho measured in the warm start, or the method's default."""
    for seed, method in product(SEEDS, ("neuclip_pool", "fastclip_v3", "openclip")):
        base = _usual(Cell("sharp", method, 2_500, lr=RATE, seed=seed, weights="sharp"))
        yield base
        if base.rho:
            yield replace(base, rho="")


def _more_pairs() -> Iterator[Cell]:
    """All methods on more pairs, and the mask where a pool holds most of them."""
    for duplicates, seed, method in product((50, 0, 90), SEEDS, METHODS):
        yield _usual(Cell("methods", method, 10_000, duplicates, lr=RATE, seed=seed))
    for seed, method in product(SEEDS, MIXED):
        yield _usual(Cell("methods", method, 10_000, 90, lr=RATE, mask=True, seed=seed))


def _optimisers() -> Iterator[Cell]:
    for method in MIXED:
        for seed in SEEDS:
            yield _usual(Cell("optimiser", method, 10_000, lr=RATE, seed=seed))
    for (lr, lion), seed, method in product(LION.items(), SEEDS, MIXED):
        yield _usual(Cell("optimiser", method, 10_000, lr=lr, seed=seed, more=lion))


def is_blended(cell: Cell) -> bool:
    """Whether mixes of this run's weights with the starting weights are evaluated."""
    setting = (cell.pairs, cell.duplicates, cell.batch, cell.lr)
    plain = Cell("", cell.method, *setting, seed=cell.seed)
    return cell.method in MIXED and setting in BLENDED and replace(cell, stage="") == _usual(plain)


def _usual(cell: Cell) -> Cell:
    """The cell with the rule for rho that `neuclip finetune` uses, measured in the warm start."""
    return replace(cell, rho="auto", warm=WARM) if has_rho(cell.method) else cell
