"""The plan: which runs there are, and in which order.

A section is a question; its cells are runs. Sections share runs: the point of a grid that is the
recipe itself trains once. `ORDER` is the order of all runs, and every prefix of it is a study.

Sections that choose (`tuned`, `published`) do so by the development splits, so their cells follow
from the rows so far. `suspects` are changes of the recipes: people choose by them what to try next.
They and `negatives` run on the development splits alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from studies.quality.cell import BATCH, Cell
from studies.quality.datasets import DATA_SETS
from studies.quality.recipes import (
    BOUNDED,
    CHANGES,
    METHODS,
    NAMED,
    RECIPES,
    cell,
    grid,
    lengthened,
)
from studies.quality.suspects import SUSPECTS
from studies.quality.variants import GROUPED

Rows = Mapping[str, Mapping[str, Any]]

MAIN = ("neuclip_pool", "rgcl_batch", "fastclip_v3", "openclip")
FIVE_SEEDS = (*MAIN, "neuclip", "rgcl_queue")
"""The methods that get five seeds; the others get two."""
REST = tuple(method for method in METHODS if method not in MAIN)
TWO_SEEDS = tuple(method for method in METHODS if method not in FIVE_SEEDS)
ACCUMULATED = ("openclip", "fastclip_v3", "neuclip_pool")
SUSPECTED = ("neuclip_pool", "openclip", "rgcl_batch", "infonce_queue", "rgcl_queue")
"""The methods whose recipes have suspects."""
BOUNDS = ("bound0.05", "bound0.07", "bound0.09")
"""Suspects with a lower bound of the temperature; 0.09 also starts there, above the usual 0.07."""
QUEUES = ("union4-aligned", "union4-aligned-two-sided", "union16-aligned")
"""Suspects with a queue that moves with the batch."""
RIVALS = ("aligned", "queue4-aligned")
"""Suspects of `infonce_queue` with such a queue."""
SECTIONS = (
    "untuned", "longer", "augmented", "bounded", "equal", "tuned", "memory", "published",
    "negatives", "suspects",
)  # fmt: skip
FEWER = 64
"""Pairs in a group of the section `negatives`: the negatives of an anchor, and itself."""


@dataclass(frozen=True)
class Line:
    """A line of the order: cells of one section on one data set.

    Attributes:
        section: `untuned`: the recipes; `longer`: the recipes for more passes; `augmented`: the
            same with random changes of the images; `bounded`: the same with a higher lower bound of
            the temperature; `equal`: bare names as captions on data of equal size; `tuned`: each
            method's grid at seed 0, and its best point at other seeds; `memory`: steps of more
            pairs than the memory holds (64), by accumulation; `published`: a search over the
            settings of `neuclip` at seed 0, and its best at other seeds; `negatives`: steps of a
            batch whose anchors have all of it as negatives, groups of 64 alone, or such groups
            with the normalizers of the batch; `suspects`: changed recipes.
        data: name of the data set.
        batch: pairs in a step.
        methods: in order.
        seeds: in order; all methods at the first seed come first.
        rate: factor on the learning rates of the recipes (`memory`).
        longer: factor on the passes of the data set (`longer`, `augmented`, `bounded`,
            `negatives`, `suspects`).
        labels: of suspects, those that run; none: all.
    """

    section: str
    data: str
    batch: int
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    rate: float = 1.0
    longer: int = 1
    labels: tuple[str, ...] = ()


ORDER = (
    # 1. The recipes at batch 64: all methods and three seeds of the main ones on the smallest data,
    #    then the main ones on all data.
    Line("untuned", "emoji", 64, METHODS, (0,)),
    Line("untuned", "emoji", 64, MAIN, (1,)),
    Line("untuned", "emoji", 64, MAIN, (2,)),
    Line("untuned", "icons", 64, MAIN, (0,)),
    Line("untuned", "glyphs", 64, MAIN, (0,)),
    Line("memory", "emoji", 256, ACCUMULATED, (0,)),
    Line("longer", "emoji", 64, MAIN, (0,), longer=3),
    Line("longer", "emoji", 64, ("rgcl_queue",), (0,), longer=3),
    Line("longer", "icons", 64, ("neuclip_pool", "rgcl_batch"), (0,), longer=3),
    Line("augmented", "emoji", 64, ("neuclip_pool", "rgcl_batch"), (0,), longer=3),
    Line("longer", "emoji", 64, ("neuclip_pool", "rgcl_batch"), (1,), longer=3),
    Line("augmented", "glyphs", 64, ("neuclip_pool", "rgcl_batch"), (0,)),
    Line("untuned", "emoji", 256, ("neuclip_pool", "rgcl_batch"), (0,)),
    Line("untuned", "emoji", 256, ("fastclip_v3", "openclip"), (0,)),
    Line("untuned", "glyphs", 256, ("rgcl_batch",), (0,)),
    Line("untuned", "icons", 256, ("rgcl_batch",), (0,)),
    Line("suspects", "emoji", 64, SUSPECTED, (0,)),
    Line("suspects", "emoji", 64, ("neuclip_pool",), (0,), longer=3),
    Line(
        "suspects", "emoji", 64, ("rgcl_batch",), (0,), longer=3,
        labels=("groups16", "groups32", "names", "names-crops", "set-names"),
    ),
    Line(
        "suspects", "glyphs", 64, ("neuclip_pool", "rgcl_batch"), (0,),
        labels=("balanced", "two-sided", *QUEUES, "groups16", "names", "names-mask", *BOUNDS),
    ),
    Line(
        "suspects", "icons", 64, ("neuclip_pool", "rgcl_batch"), (0,),
        labels=(*QUEUES, "groups16", "names"),
    ),
    Line("suspects", "icons", 64, ("neuclip_pool",), (0,), labels=(f"{BOUNDED}-{NAMED}", *BOUNDS)),
    Line("equal", "glyphs7", 64, ("neuclip_pool", "rgcl_batch"), (0,)),
    Line("equal", "icons7", 64, ("neuclip_pool", "rgcl_batch"), (0,)),
    Line("equal", "glyphs7wrong", 64, ("neuclip_pool", "rgcl_batch"), (0,)),
    Line("equal", "emoji", 64, ("neuclip_pool", "rgcl_batch"), (0,), longer=3),
    Line("negatives", "glyphs", 256, ("rgcl_batch",), (0,)),
    Line("negatives", "icons", 256, ("rgcl_batch",), (0,)),
    Line("negatives", "emoji", 256, ("rgcl_batch",), (0,), longer=3),
    Line("bounded", "icons", 64, ("neuclip_pool",), (0, 1, 2)),
    Line("untuned", "icons", 64, ("rgcl_batch",), (1, 2)),
    Line("bounded", "icons", 64, ("neuclip_pool",), (0,), longer=3),
    Line("bounded", "icons", 64, ("fastclip_v3",), (0,)),
    Line("untuned", "glyphs", 64, ("infonce_queue", "moco"), (0,)),
    Line("untuned", "glyphs", 64, ("rgcl_queue",), (0,)),
    Line("untuned", "icons", 64, ("rgcl_queue",), (0, 1)),
    Line("untuned", "emoji", 64, ("rgcl_queue",), (1,)),
    Line("untuned", "glyphs", 64, METHODS, (0,)),
    Line("suspects", "glyphs", 64, ("infonce_queue",), (0,), labels=RIVALS),
    Line("suspects", "emoji", 64, ("rgcl_queue",), (0,), longer=3),
    Line("suspects", "glyphs", 64, ("rgcl_queue",), (0,)),
    Line("untuned", "glyphs", 64, ("rgcl_queue", "rgcl_batch", "neuclip_pool"), (1, 2)),
    Line("longer", "emoji", 64, ("rgcl_queue",), (1,), longer=3),
    Line("untuned", "emoji", 64, ("neuclip", "rgcl_queue"), (1, 2)),
    Line("untuned", "icons", 64, MAIN, (1,)),
    Line("longer", "icons", 64, MAIN, (0,), longer=3),
    Line("augmented", "emoji", 64, MAIN, (0,), longer=3),
    # 2. A memory of 64 pairs: larger steps by accumulation.
    Line("memory", "icons", 256, ACCUMULATED, (0,)),
    Line("memory", "emoji", 1024, ACCUMULATED, (0,)),
    Line("memory", "emoji", 1024, ACCUMULATED, (0,), rate=0.5),
    # 3. The same small grid for every method, on emoji.
    Line("tuned", "emoji", 64, METHODS, (0,)),
    # 4. Larger batches, the other methods on icons, more seeds.
    Line("untuned", "emoji", 256, MAIN, (0, 1)),
    Line("untuned", "icons", 64, REST, (0,)),
    Line("untuned", "icons", 256, MAIN, (0,)),
    Line("untuned", "glyphs", 64, FIVE_SEEDS, (1, 2)),
    Line("untuned", "icons", 64, MAIN, (2,)),
    Line("tuned", "emoji", 64, METHODS, (1,)),
    Line("suspects", "emoji", 64, SUSPECTED, (1, 2)),
    Line("suspects", "icons", 64, SUSPECTED, (0,)),
    # 5. The published form on icons, where n / B is large.
    Line("published", "icons", 64, ("neuclip",), (0,)),
    Line("published", "icons", 64, ("neuclip",), (1, 2)),
    # 6. All seeds at batch 64.
    Line("untuned", "emoji", 64, FIVE_SEEDS, (3, 4)),
    Line("untuned", "emoji", 64, TWO_SEEDS, (1,)),
    Line("tuned", "emoji", 64, FIVE_SEEDS, (2, 3, 4)),
    Line("untuned", "icons", 64, ("neuclip", "rgcl_queue"), (1, 2)),
    Line("untuned", "icons", 64, FIVE_SEEDS, (3, 4)),
    Line("untuned", "icons", 64, TWO_SEEDS, (1,)),
    Line("untuned", "glyphs", 64, FIVE_SEEDS, (3, 4)),
    Line("untuned", "glyphs", 64, TWO_SEEDS, (1,)),
    # 7. The other batches, and the rest of each section.
    Line("untuned", "emoji", 32, MAIN, (0, 1)),
    Line("untuned", "icons", 32, MAIN, (0,)),
    Line("untuned", "glyphs", 256, MAIN, (0, 1)),
    Line("memory", "icons", 1024, ACCUMULATED, (0,)),
    Line("memory", "icons", 1024, ACCUMULATED, (0,), rate=0.5),
    Line("tuned", "icons", 64, METHODS, (0,)),
    Line("tuned", "icons", 64, METHODS, (1,)),
    Line("tuned", "icons", 64, FIVE_SEEDS, (2, 3, 4)),
    Line("published", "icons", 256, ("neuclip",), (0,)),
    Line("published", "icons", 256, ("neuclip",), (1, 2)),
    Line("memory", "emoji", 256, ACCUMULATED, (1, 2, 3, 4)),
    Line("memory", "emoji", 1024, ACCUMULATED, (1, 2, 3, 4)),
    Line("memory", "emoji", 1024, ACCUMULATED, (1, 2, 3, 4), rate=0.5),
    Line("memory", "icons", 256, ACCUMULATED, (1, 2, 3, 4)),
    Line("memory", "icons", 1024, ACCUMULATED, (1, 2, 3, 4)),
    Line("memory", "icons", 1024, ACCUMULATED, (1, 2, 3, 4), rate=0.5),
    *(
        Line("untuned", data, batch, methods, seeds)
        for batch, data, (methods, seeds) in product(
            (256, 32, 128),
            ("emoji", "icons", "glyphs"),
            ((FIVE_SEEDS, (0, 1, 2, 3, 4)), (TWO_SEEDS, (0, 1))),
        )
    ),
)  # fmt: skip
"""The order of the runs. A cell that occurs in several lines trains at the first."""


def plan(rows: Rows, order: Sequence[Line] = ORDER) -> list[Cell]:
    """The cells in order, each once, as far as the rows so far decide them.

    Args:
        rows: the development rows by cell.
        order: the lines.
    """
    cells = [found for line in order for found in cells_of(line, rows)]
    return list({found.name: found for found in cells}.values())


def cells_of(line: Line, rows: Rows) -> list[Cell]:
    """The cells of a line, as far as the rows so far decide them."""
    return list(_SECTIONS[line.section](line, rows))


@dataclass(frozen=True)
class Part:
    """A section on a data set, as far as the rows so far decide it.

    Attributes:
        cells: its runs.
        evaluated: those for the test splits: of a search, what it chose, at all seeds; none of
            `negatives` and `suspects`; all of the other sections.
        decided: whether `cells` are all.
    """

    cells: list[Cell]
    evaluated: list[Cell]
    decided: bool


def part(section: str, data: str, rows: Rows, order: Sequence[Line] = ORDER) -> Part:
    """A section on a data set.

    Args:
        section: name of the section.
        data: name of the data set.
        rows: the development rows by cell.
        order: the lines.
    """
    cells: dict[str, Cell] = {}
    evaluated: dict[str, Cell] = {}
    decided = True
    for line in order:
        if (line.section, line.data) == (section, data):
            mine = cells_of(line, rows)
            cells |= {each.name: each for each in mine}
            if line.section in SEARCHES:
                searched = (_stages(line, method, rows) for method in line.methods)
                cells |= {each.name: each for s in searched for stage in s for each in stage}
                found = [chosen(line, method, rows) for method in line.methods]
                decided = decided and None not in found
                mine = [replace(each, seed=seed) for seed in line.seeds for each in found if each]
            if line.section not in CHOOSING_ONLY:
                evaluated |= {each.name: each for each in mine}
    return Part(list(cells.values()), list(evaluated.values()), decided)


def score(row: Mapping[str, Any]) -> float:
    """What choices go by: the last top-1 on the development splits, their mean; 0 if it failed."""
    if row.get("failed"):
        return 0.0
    last = {each["split"]: each["acc1"] for each in row["evaluations"]}
    return sum(last.values()) / len(last)


def best(cells: Sequence[Cell], rows: Rows) -> Cell | None:
    """The cell with the best score, the first of equals; None until all have run."""
    if any(each.name not in rows for each in cells):
        return None
    return max(cells, key=lambda each: score(rows[each.name]))


# --- the sections -------------------------------------------------------------------------------


def _recipes(line: Line, rows: Rows) -> Iterator[Cell]:
    for seed, method in product(line.seeds, line.methods):
        found = cell(RECIPES[method], line.data, batch=line.batch, seed=seed)
        if (change := CHANGES.get(line.section)) is not None:
            found = change(found)
        yield lengthened(found, line.longer)


def _memory(line: Line, rows: Rows) -> Iterator[Cell]:
    accum = line.batch // BATCH
    for seed, method in product(line.seeds, line.methods):
        recipe = replace(RECIPES[method], lr=line.rate * RECIPES[method].lr)
        yield cell(recipe, line.data, batch=BATCH, accum=accum, seed=seed)


def _searched(line: Line, rows: Rows) -> Iterator[Cell]:
    """The search at seed 0, then what it chose at the other seeds."""
    for seed, method in product(line.seeds, line.methods):
        if seed == 0:
            yield from (each for stage in _stages(line, method, rows) for each in stage)
        elif (found := chosen(line, method, rows)) is not None:
            yield replace(found, seed=seed)


def _suspects(line: Line, rows: Rows) -> Iterator[Cell]:
    mine = [
        suspect
        for suspect in SUSPECTS
        if suspect.method in line.methods and (not line.labels or suspect.label in line.labels)
    ]
    for seed, suspect in product(line.seeds, mine):
        yield suspect.cell(line.data, seed, line.longer)


def _negatives(line: Line, rows: Rows) -> Iterator[Cell]:
    """Runs with a whole batch, its groups of `FEWER`, and the groups with its normalizers."""
    for whole in _recipes(line, rows):
        settings = {"name": GROUPED, "group_size": FEWER}
        yield whole
        for note, other in (("", {}), ("-whole", {"normalizers": "batch"})):
            yield replace(
                whole,
                note=f"{whole.note}-groups{FEWER}{note}",
                method={**whole.method, **settings, **other},
            )


_SECTIONS: Mapping[str, Callable[[Line, Rows], Iterator[Cell]]] = {
    "untuned": _recipes,
    "longer": _recipes,
    "augmented": _recipes,
    "bounded": _recipes,
    "equal": _recipes,
    "tuned": _searched,
    "memory": _memory,
    "published": _searched,
    "negatives": _negatives,
    "suspects": _suspects,
}
SEARCHES = ("tuned", "published")
CHOOSING_ONLY = ("negatives", "suspects")
"""Sections on the development splits alone, which decide what to try next."""


def chosen(line: Line, method: str, rows: Rows) -> Cell | None:
    """What the search of a line chose for a method; None until it is complete."""
    stages = list(_stages(line, method, rows))
    expected = 1 if line.section == "tuned" else len(STAGES)
    return best(stages[-1], rows) if len(stages) == expected else None


def _stages(line: Line, method: str, rows: Rows) -> Iterator[list[Cell]]:
    """The stages of a search at seed 0, as far as the rows so far decide them."""
    if line.section == "tuned":
        yield [cell(point, line.data, batch=line.batch) for point in grid(method)]
        return
    point = START
    for changes in STAGES:
        points = [{**point, **change} for change in changes]
        cells = [published(each, line.data, line.batch) for each in points]
        yield cells
        found = best(cells, rows)
        if found is None:
            return
        point = points[cells.index(found)]


# --- the published form -------------------------------------------------------------------------

START: Mapping[str, Any] = {"num_prototypes": 2048, "inner_steps": 10, "restart_passes": 0.1}
STAGES: tuple[tuple[Mapping[str, Any], ...], ...] = (
    tuple({"rho": rho} for rho in (3.5, 5.0, 6.5, 8.5)),
    tuple(
        {"num_prototypes": m, "inner_steps": steps}
        for m, steps in product((512, 2048, 8192), (1, 10))
    ),
    tuple({"restart_passes": passes} for passes in (0.015, 0.1, 0.5, 2.0)),
)
"""The search for the best settings of `neuclip`, each stage from the best of the one before: rho;
m and T_u; T_r, in passes over the data, of which 2 is never."""


def published(point: Mapping[str, Any], data: str, batch: int) -> Cell:
    """A run of `neuclip` in the search.

    Args:
        point: settings, with `restart_passes` for `restart_steps`.
        data: name of the data set.
        batch: pairs in a step.
    """
    settings = dict(point)
    passes = settings.pop("restart_passes")
    steps = max(1, round(passes * DATA_SETS[data].about / batch))
    recipe = RECIPES["neuclip"]
    found = cell(recipe, data, batch=batch)
    note = (
        f"lr{recipe.lr:g}-rho{point['rho']:g}-m{point['num_prototypes']}"
        f"-Tu{point['inner_steps']}-Tr{passes:g}"
    )
    method = {**found.method, **settings, "restart_steps": steps}
    return replace(found, note=note, method=method)
