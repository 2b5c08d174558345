"""The runs of the study of quality: named cells, made from the small tables below.

A cell is one training run. Later stages depend on earlier results: the best settings of the stage
`tune` are used by `final`, `batch` and `size`. So the plan is a function of the results so far. The
cells are ordered so that every prefix of the plan is useful.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from neuclip.catalogue.neuclip import FRESH_BATCHES, MAX_POOL, POOL_BATCHES
from neuclip.config.recipes import RECIPES, merge, read_yaml
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate

FULL = 46_780
SHARD = 5_000
BATCH = 64
SEEDS = (0, 1, 2)
SHORT, MEDIUM, LONG = 2, 4, 12
"""Epochs over all data; runs on other sizes see the same number of samples."""

LEARNING_RATES = (1e-3, 2e-3)
POOL = {"pool_size": 2048}
NEWEST = {"pool_size": 8192, "gradient_size": 2048}
NETWORK = {
    "num_prototypes": 2048,
    "restart_steps": 32,
    "epsilon": 1e-14,
    "temperature_gradient": "exact",
}
"""The published method, its size and restarts scaled to these data, its objective the others'."""


@dataclass(frozen=True)
class Contender:
    """A method with its grid.

    Attributes:
        method: its name in the catalogue.
        settings: the settings that differ from the catalogue's defaults.
        temperatures: settings of the temperature, all tried at the lower learning rate, the best
            also at the higher one.
    """

    method: str
    settings: Mapping[str, Any]
    temperatures: tuple[Mapping[str, Any], ...]


def _rho(*values: float) -> tuple[Mapping[str, Any], ...]:
    return tuple({"rho": value} for value in values)


def _start(*values: float) -> tuple[Mapping[str, Any], ...]:
    return tuple({"temperature": value} for value in values)


CONTENDERS: dict[str, Contender] = {
    "neuclip_pool": Contender("neuclip_pool", {**POOL, "gamma": 0.4}, _rho(6.5, 5.0, 3.5)),
    # The temperature falls until the KL divergence of the softmax over negatives from the uniform
    # distribution is rho. It is at most log(B - 1) = 4.1 over a batch, and 10.8 over all pairs.
    "rgcl_batch": Contender("rgcl_batch", {}, _rho(6.5, 3.5, 2.0)),
    "openclip": Contender("openclip", {}, _start(0.07, 0.03, 0.015)),
    # A fourth value: the best of three was at the edge, and amorlip's temperature fell to its
    # bound with all three.
    "fastclip_v3": Contender("fastclip_v3", {"gamma": 0.7}, _rho(6.5, 5.0, 3.5, 2.0)),
    "siglip": Contender("siglip", {}, _start(0.1, 0.05, 0.02)),
    "scent": Contender("scent", {}, _rho(6.5, 5.0, 3.5)),
    "amorlip": Contender(
        "amorlip",
        {"previous_epochs": 8},
        tuple({"rho": rho, "late_rho": rho} for rho in (6.5, 5.0, 3.5, 2.0)),
    ),
    "sogclr": Contender("sogclr", {}, _start(0.07, 0.05, 0.03)),
    "isogclr": Contender("isogclr", {}, _start(0.05, 0.04, 0.03)),
    "fastclip_v0": Contender("fastclip_v0", {"gamma": 0.7}, _start(0.07, 0.03, 0.015)),
    "fastclip_v1": Contender("fastclip_v1", {"gamma": 0.7}, _start(0.07, 0.05, 0.03)),
    "fastclip_v2": Contender("fastclip_v2", {"gamma": 0.7}, _start(0.07, 0.05, 0.03)),
    "neuclip": Contender("neuclip", {**NETWORK, "gamma": 0.4}, _rho(6.5, 5.0, 3.5)),
}

INGREDIENTS: dict[str, Mapping[str, Any]] = {
    "base": {},
    "whole-gradient": {"name": "pool_whole_gradient"},
    "union": {"gradient": "union"},
    "detached": {"gradient": "detached"},
    "own-excluded": dict(NEWEST),
    "fresh-gradient": {**NEWEST, "name": "pool_own_counted"},
    "fresh-gradient-rho5": {**NEWEST, "name": "pool_own_counted", "rho": 5.0},
    "own-excluded-rho5.75": {**NEWEST, "rho": 5.75},
    "own-excluded-rho3.5": {**NEWEST, "rho": 3.5},
    "own-excluded-gamma0.7": {**NEWEST, "gamma": 0.7},
    "gamma-by-counts": {"gamma": 0.03},
    "anchor-gamma": {"name": "pool_anchor_gamma"},
    "moving-average": {"name": "fastclip_v3"},
    "restart-trained-detached": {"name": "neuclip", **NETWORK},
    "restart-trained": {"name": "neuclip", **NETWORK, "gradient": "full"},
    "restart-untrained": {"name": "neuclip", **NETWORK, "gradient": "full", "inner_steps": 0},
    "m512": {"pool_size": 512},
    "m8192": {"pool_size": 8192, "gradient_size": 8192},
    "gamma0.7": {"gamma": 0.7},
    "gamma0.2": {"gamma": 0.2},
    "gamma0": {"gamma": 0.0},
    "age-weights": {"name": "pool_age_weights", "pool_size": 8192, "gradient_size": 8192},
    "m1024": {"pool_size": 1024},
    "m4096": {"pool_size": 4096, "gradient_size": 4096},
    "cosine": {"gamma_decay_epochs": None},
    "doubled-temperature-gradient": {"temperature_gradient": "fastclip"},
    "rho8": {"rho": 8.0},
    "rolling": {
        "name": "neuclip",
        **NETWORK,
        "refresh": "rolling",
        "gradient": "full",
        "inner_steps": 0,
    },
}
"""Changes of the pool of recent embeddings; gamma falls to its floor after one epoch."""

READINGS: dict[str, Mapping[str, Any]] = {
    "as-here": {},
    "prediction-alone": {"mixing": "none"},
    "adagrad-by-coordinate": {"prototype_optimizer": "adagrad"},
    "adagrad-by-coordinate-lr0.01": {"prototype_optimizer": "adagrad", "prototype_lr": 0.01},
    "restart-from-current": {"restart_from": "current"},
    "optimizer-kept": {"restart_optimizer": False},
    "batch-fill": {"restart_fill": "batch"},
    "temperature-gradient-doubled": {"temperature_gradient": "fastclip"},
}
"""The published method in the other reading of what its paper leaves open (docs/differences.md)."""

HISTORY = ("trained", "trained-once", "trained-adam", "trained-adagrad", "trained-sgd")
"""Ingredients with results that no method of the catalogue trains any more."""

LONG_INGREDIENTS = (
    "own-excluded",
    "fresh-gradient",
    "fresh-gradient-rho5",
    "own-excluded-gamma0.7",
    "own-excluded-rho5.75",
    "own-excluded-rho3.5",
    "detached",
    "gamma0.2",
    "union",
    "m8192",
    "m512",
)
"""Ingredients that also run at full length, with the gamma schedule of the final runs."""

DEFAULT = "own-excluded"
"""The ingredient that is the default of `neuclip_pool`.

The contender `neuclip_pool` keeps the pool of 2,048 embeddings with which the study started.
`fresh-gradient` was the default until 2026-11-27: it counts an anchor's positive among its
negatives.
"""

LEADERS = ("neuclip_pool", "rgcl_batch")
NEXT = ("fastclip_v3", "openclip")
"""The contenders whose long runs come first."""

INDISTINCT = 0.025
"""The margin of top-1 within which short runs do not separate temperatures.

The short runs of `fastclip_v3` were wrong by 2 points. All temperatures within the margin get a
long run, and the best long run is the method's. Our own method gets one long run, at the best
temperature of its short runs, which is to its disadvantage.
"""
OURS, PUBLISHED = "neuclip_pool", "neuclip"

PEERS = (
    "scent", "sogclr", "fastclip_v1", "fastclip_v2", "isogclr", "amorlip", "fastclip_v0", "siglip",
)  # fmt: skip
"""The other contenders, ordered by their short runs or by the short runs of similar methods."""

BATCHES = (256, 32, 128, BATCH)
SWEPT = (DEFAULT, "rgcl_batch", "openclip", "fastclip_v3", PUBLISHED)
"""The contenders whose batch and data size are varied."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: purpose of the run.
        label: the contender or ingredient.
        method: settings of the method, including its name.
        epochs: over `samples` pairs of the training data.
        measures: whether the error of the normalizers is measured over all training data.
        note: distinguishes cells of one label.
    """

    stage: str
    label: str
    method: Mapping[str, Any]
    lr: float
    seed: int = 0
    batch: int = BATCH
    samples: int = FULL
    epochs: int = SHORT
    measures: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the cell and its folder, unique in the plan."""
        parts = (self.stage, self.label, self.note, f"b{self.batch}", f"n{self.samples}")
        return "_".join(part for part in (*parts, f"s{self.seed}") if part)

    @property
    def evaluated_every(self) -> int:
        """Epochs between two evaluations: four in a long run, one at the end of a short one."""
        return self.epochs if self.epochs <= SHORT else max(1, self.epochs // 4)

    def config(self, data: Path, logs: Path) -> RunConfig:
        """The recipe `demo` with the cell's settings."""
        shards = [f"{data}/train/{number:05}.tar" for number in range(self.samples // SHARD)]
        steps = self.epochs * self.samples // self.batch
        tree = merge(
            read_yaml(RECIPES / "demo.yaml"),
            {
                "name": self.name,
                "seed": self.seed,
                "resume": "auto",
                "method": dict(self.method),
                "data": {
                    "train_data": f"{data}/train" if self.samples == FULL else "::".join(shards),
                    "batch_size": self.batch,
                    "workers": 0,
                },
                "optim": {
                    "epochs": self.epochs,
                    # The same number of warm-up samples; the rate scales as the batch's root.
                    "warmup": 200 * BATCH // self.batch,
                    "lr": self.lr * (self.batch / BATCH) ** 0.5,
                },
                "evaluation": {
                    "val_data": f"{data}/unseen_face::{data}/unseen_character",
                    "val_frequency": self.evaluated_every,
                },
                "output": {
                    "logs": str(logs),
                    "save_frequency": self.evaluated_every if self.measures else 0,
                    "save_every_steps": max(1, 32_000 // self.batch),
                    "keep_step_checkpoints": 1,
                    "log_every_n_steps": max(1, steps // 40),
                },
            },
        )
        return validate(tree, self.name)


@dataclass
class Findings:
    """The results so far: rows by the name of their cell."""

    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def score(self, cell: Cell) -> float | None:
        """Final top-1, mean over the splits; None before the cell has run, 0 if it failed."""
        row = self.rows.get(cell.name)
        if row is None:
            return None
        return 0.0 if row.get("failed") else final_score(row)

    def best(self, label: str) -> Cell | None:
        """The best cell of a contender's grid; None until the whole grid has run."""
        return self.best_of(list(tuning(label, self)))

    def candidates(self, label: str) -> list[Cell]:
        """The long runs of seed 0 that decide a contender's temperature; none before its grid."""
        best = self.best(label)
        if best is None:
            return []
        grid = [cell for cell in tuning(label, self) if cell.lr == LEARNING_RATES[0]]
        scores = {id(cell): self.score(cell) or 0.0 for cell in grid}
        first = max(grid, key=lambda cell: scores[id(cell)])
        rivals = [
            cell
            for cell in grid
            if cell is not first and scores[id(first)] - scores[id(cell)] < INDISTINCT
        ]
        rivals = [] if label == OURS else sorted(rivals, key=lambda cell: -scores[id(cell)])
        return [
            long_run(label, best),
            *(long_run(label, replace(cell, lr=best.lr), temperature_of(cell)) for cell in rivals),
        ]

    def chosen(self, label: str) -> Cell | None:
        """The best of a contender's long runs of seed 0; None until all have run."""
        candidates = self.candidates(label)
        return self.best_of(candidates) if candidates else None

    def best_of(self, cells: Sequence[Cell]) -> Cell | None:
        """The best of some cells; None until all have run."""
        scores = [self.score(cell) for cell in cells]
        if any(score is None for score in scores):
            return None
        return max(zip(cells, scores, strict=True), key=lambda pair: pair[1] or 0.0)[0]


def final_score(row: Mapping[str, Any]) -> float:
    """The last top-1 accuracy, mean over the splits."""
    last = {each["split"]: each["acc1"] for each in row["evaluations"]}
    return sum(last.values()) / len(last)


def tuning(label: str, found: Findings) -> Iterator[Cell]:
    """A contender's grid: its temperatures at the lower rate, then the best at the higher rate."""
    lower, higher = LEARNING_RATES
    numbers = range(len(CONTENDERS[label].temperatures))
    cells = [tuning_cell(label, number, lower) for number in numbers]
    yield from cells
    best = found.best_of(cells)
    if best is not None:
        yield tuning_cell(label, cells.index(best), higher)


def tuning_cell(label: str, temperature: int, lr: float) -> Cell:
    """A point of a contender's grid."""
    contender = CONTENDERS[label]
    own = contender.temperatures[temperature]
    method = {"name": contender.method, **contender.settings, **own}
    return Cell("tune", label, method, lr, note=f"lr{lr:g}-t{temperature}")


def long_run(label: str, like: Cell, note: str = "", seed: int = 0) -> Cell:
    """A run of full length with the settings of another cell."""
    return Cell("final", label, like.method, like.lr, seed, epochs=LONG, measures=True, note=note)


def temperature_of(cell: Cell) -> str:
    """The setting of the temperature as a word for cell names."""
    key = "rho" if "rho" in cell.method else "temperature"
    return f"{key}{cell.method[key]:g}"


def ingredients(seed: int, found: Findings) -> Iterator[Cell]:
    """The pool with one change each, in short runs, at the best rho of its grid."""
    best = found.best_of([cell for cell in tuning(OURS, found) if cell.lr == LEARNING_RATES[0]])
    if best is not None:
        base = replace(best, method={**best.method, "gamma_decay_epochs": 1.0})
        for label in INGREDIENTS:
            yield _changed(label, Cell("ingredient", label, base.method, best.lr, seed))


def readings(found: Findings, seed: int = 0) -> Iterator[Cell]:
    """The published method with one reading changed each, in short runs at its best settings."""
    best = found.best(PUBLISHED)
    if best is not None:
        for label, changed in READINGS.items():
            method = {**best.method, **changed}
            yield Cell("reading", label, method, best.lr, seed, measures=True)


def long_ingredients(found: Findings, seed: int = 0) -> Iterator[Cell]:
    """The pool's final run with one change each."""
    final = found.chosen(OURS)
    if final is not None:
        for label in LONG_INGREDIENTS:
            yield _changed(label, replace(final, stage="long-ingredient", seed=seed))


def _changed(label: str, like: Cell) -> Cell:
    changed = INGREDIENTS[label]
    another = changed.get("name", OURS) in {PUBLISHED, "fastclip_v3"}
    kept = {key: value for key, value in like.method.items() if not (another and key in POOL)}
    return replace(like, label=label, method={**kept, **changed})


def plan(
    rows: Mapping[str, Mapping[str, Any]], ingredient_seeds: Sequence[int] = (0, 1)
) -> list[Cell]:
    """All cells whose settings are known, in the order in which they run."""
    found = Findings(rows)
    chosen = {label: cell for label in CONTENDERS if (cell := found.chosen(label)) is not None}
    leaders, strongest = _only(chosen, LEADERS), _only(chosen, NEXT[:1])
    default = {cell.label: cell for cell in _long(found, DEFAULT)}
    swept = _only({**chosen, **default}, SWEPT)
    cells = [cell for label in LEADERS for cell in tuning(label, found)]
    cells += _candidates(LEADERS, found)
    cells += _seeds(leaders, 1)
    cells += [cell for label in NEXT for cell in tuning(label, found)]
    cells += [cell for label in NEXT for cell in found.candidates(label)[:1]]
    cells += _long(found, DEFAULT)
    cells += _long(found, DEFAULT, seed=1)
    cells += _largest_batch(leaders)
    cells += _candidates(NEXT, found)
    cells += _seeds(leaders, 2)
    cells += _seeds(strongest, 1)
    cells += _long(found, DEFAULT, seed=2)
    cells += _seeds(strongest, 2)
    cells += _long(found, "fresh-gradient-rho5")
    cells += _largest_batch(strongest)
    for label in PEERS:
        cells += [*tuning(label, found), *found.candidates(label)[:1]]
    cells += _long(found, "detached")
    cells += _largest_batch(strongest, seed=1)
    ends = _sizes({**default, **strongest})  # does the lead grow with n / B?
    cells += [cell for cell in ends if cell.samples in {5_000, FULL}]
    cells += ingredients(0, found)
    cells += [*tuning(PUBLISHED, found), *found.candidates(PUBLISHED)[:1], *readings(found)]
    for label in ("own-excluded-gamma0.7", "own-excluded-rho5.75"):
        cells += _long(found, label)
    cells += _largest_batch(default)
    cells += found.candidates(PUBLISHED)
    for seed in ingredient_seeds[1:]:
        cells += ingredients(seed, found)
    cells += _candidates(PEERS, found)
    cells += long_ingredients(found)
    cells += [cell for label in CONTENDERS for cell in tuning(label, found)]
    cells += _candidates(CONTENDERS, found)
    cells += _batches(swept, MEDIUM)
    cells += _sizes(swept)
    for seed in SEEDS[1:]:
        cells += _seeds(chosen, seed)
    cells += _batches(swept, LONG)
    return list({cell.name: cell for cell in cells}.values())


def _candidates(labels: Iterable[str], found: Findings) -> list[Cell]:
    """The candidates of several contenders, all first choices before any second one."""
    lists = [found.candidates(label) for label in labels]
    return [cell for rank in zip_longest(*lists) for cell in rank if cell is not None]


def _long(found: Findings, label: str, seed: int = 0) -> list[Cell]:
    return [cell for cell in long_ingredients(found, seed) if cell.label == label]


def _only(chosen: Mapping[str, Cell], labels: Iterable[str]) -> dict[str, Cell]:
    return {label: chosen[label] for label in labels if label in chosen}


def _seeds(chosen: Mapping[str, Cell], seed: int) -> Iterator[Cell]:
    for label, cell in chosen.items():
        yield long_run(label, cell, cell.note, seed)


def _batches(chosen: Mapping[str, Cell], epochs: int, seed: int = 0) -> Iterator[Cell]:
    """Runs at other batches; at 64 the long runs are of stage `final`, the medium ones `size`."""
    for batch in BATCHES:
        for label, best in chosen.items():
            if batch == BATCH:
                yield from [_size(best, FULL)] if epochs == MEDIUM else []
            else:
                method = scaled_to_batch(label, best.method, batch)
                yield replace(
                    best, stage="batch", method=method, seed=seed, batch=batch, epochs=epochs,
                    note=f"e{epochs}",
                )  # fmt: skip


def _largest_batch(chosen: Mapping[str, Cell], seed: int = 0) -> list[Cell]:
    return [cell for cell in _batches(chosen, LONG, seed) if cell.batch == max(BATCHES)]


def scaled_to_batch(label: str, method: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The settings at another batch: pools keep their age in batches, as the product's do."""
    scaled = dict(method)
    if label == OURS:
        scaled["pool_size"] = 32 * batch
    if label == DEFAULT:
        scaled["pool_size"] = min(POOL_BATCHES * batch, MAX_POOL)
        scaled["gradient_size"] = FRESH_BATCHES * batch
    return scaled


def _sizes(chosen: Mapping[str, Cell]) -> Iterator[Cell]:
    for samples in (5_000, 15_000, FULL):
        for best in chosen.values():
            yield _size(best, samples)


def _size(best: Cell, samples: int) -> Cell:
    epochs = MEDIUM if samples == FULL else round(180_000 / samples)
    return replace(best, stage="size", note="", samples=samples, epochs=epochs)
