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
    # 1. How fast, and which temperature rule: half of the pairs are duplicates, one seed.
    for method, lr in product(("openclip", "neuclip_pool"), RATES):
        base = Cell("rate", method, lr=lr)
        yield base
        if has_rho(method):
            yield _usual(base)
    for method, lr in product(("siglip", "fastclip_v3", "neuclip"), RATES):
        yield _usual(Cell("rate", method, lr=lr))
    # 2. What each remedy is worth, one at a time and together.
    for seed, method in product(SEEDS, ("neuclip_pool", "openclip")):
        base = _usual(Cell("remedies", method, 2_500, lr=RATE, seed=seed))
        yield base
        yield replace(base, mask=True)
        yield replace(base, apart=True)
        yield replace(base, rho="", warm=0 if base.warm else WARM)
        for more in MORE:
            yield replace(base, more=more)
    # 3. All methods, few pairs, over duplicates, with and without the mask.
    for seed, duplicates, method, mask in product(SEEDS, DUPLICATES, METHODS, (False, True)):
        base = Cell("methods", method, 1_000, duplicates, lr=RATE, mask=mask, seed=seed)
        yield _usual(base)
    # 4. Batch sizes and more pairs.
    for seed, batch, method in product(SEEDS, (16, 64), METHODS):
        yield _usual(Cell("batch", method, 1_000, batch=batch, lr=RATE, seed=seed))
    for seed, duplicates, method in product(SEEDS, DUPLICATES, METHODS):
        yield _usual(Cell("methods", method, 10_000, duplicates, lr=RATE, seed=seed))


def is_blended(cell: Cell) -> bool:
    """Whether mixes of this run's weights with the starting weights are evaluated."""
    return (
        cell.stage == "remedies"
        and _usual(cell) == cell
        and not (cell.mask or cell.apart or cell.more or (cell.warm and not cell.rho))
    )


def _usual(cell: Cell) -> Cell:
    """The cell with the rule for rho that `neuclip finetune` uses, measured in the warm start."""
    return replace(cell, rho="auto", warm=WARM) if has_rho(cell.method) else cell
