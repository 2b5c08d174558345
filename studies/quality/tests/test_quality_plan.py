"""The plan of the study: recipes, cells, their order, and what searches choose."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from quality_rows import row_of, rows_of
from studies.quality.cell import Cell
from studies.quality.datasets import MAIN_SETS
from studies.quality.plan import (
    FIVE_SEEDS,
    MAIN,
    ORDER,
    START,
    Line,
    best,
    cells_of,
    chosen,
    part,
    plan,
    published,
)
from studies.quality.recipes import GRIDS, METHODS, RECIPES, cell, grid
from studies.quality.variants import VARIANTS

from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig

TUNED = Line("tuned", "emoji", 64, ("openclip", "scent"), (0,))
PUBLISHED = Line("published", "icons", 64, ("neuclip",), (0,))


def config(found: Cell) -> RunConfig:
    return found.config(Path("train"), [Path("a"), Path("b")], Path("logs"), 11_545)


def test_every_cell_has_its_own_name_and_valid_settings():
    rows, by_name = complete({}), {}
    for line in ORDER:  # equal names are equal runs, in whatever section
        for found in cells_of(line, rows):
            assert by_name.setdefault(found.name, found) == found
    assert list(by_name) == [found.name for found in plan(rows)]
    for found in by_name.values():
        assert "/" not in found.name
        variant = found.method["name"] in VARIANTS  # test_quality_suspects.py
        if found.seed == 0 and found.data_set != "glyphs" and not variant:
            assert resolve(config(found), 1).name == found.name


def complete(rows: dict) -> dict:
    """The rows of all cells, with those that they decide."""
    while missing := [found for found in plan(rows) if found.name not in rows]:
        rows = rows | rows_of(missing)
    return rows


def test_rates_and_warm_up_follow_the_pairs_in_a_step():
    one = config(cell(RECIPES["openclip"], "emoji"))
    assert (one.optim.lr, one.optim.warmup, one.data.batch_size) == (2e-3, 200, 64)
    large = config(cell(RECIPES["openclip"], "emoji", batch=256))
    assert (large.optim.lr, large.optim.warmup) == (4e-3, 50)
    accumulated = config(cell(RECIPES["openclip"], "emoji", accum=4))
    assert accumulated.optim == large.optim
    assert (accumulated.data.batch_size, accumulated.data.accum_freq) == (64, 4)


def test_the_order_starts_with_all_methods_on_emoji_then_seeds_then_the_main_ones_on_icons():
    cells = plan({})
    first, cells = cells[: len(METHODS)], cells[len(METHODS) :]
    assert [found.label for found in first] == list(METHODS)
    assert {(found.data_set, found.batch, found.seed) for found in first} == {("emoji", 64, 0)}
    assert [(found.seed, found.label) for found in cells[:8]] == list(product((1, 2), MAIN))
    assert {(found.data_set, found.seed) for found in cells[8:12]} == {("icons", 0)}
    assert [found.label for found in cells[8:12]] == list(MAIN)


@pytest.mark.parametrize("data", MAIN_SETS)
def test_seeds_at_every_batch(data):
    cells = part("untuned", data, {}).cells
    for batch in (32, 64, 128, 256):
        for method in METHODS:
            seeds = [found.seed for found in cells if (found.label, found.batch) == (method, batch)]
            assert sorted(seeds) == list(range(5 if method in FIVE_SEEDS else 2))


def test_every_grid_has_two_rates_and_three_values_and_the_recipe():
    for method in METHODS:
        points = grid(method)
        assert len(points) == 6
        assert RECIPES[method] in points
        assert len(set(GRIDS[method])) == 3


def test_a_grid_chooses_by_development_and_the_first_of_equals():
    cells = cells_of(TUNED, {})
    assert len(cells) == 12
    assert chosen(TUNED, "openclip", {}) is None
    mine = [found for found in cells if found.label == "openclip"]
    rows = rows_of(mine) | {mine[3].name: row_of(mine[3], 0.7), mine[4].name: row_of(mine[4], 0.7)}
    assert chosen(TUNED, "openclip", rows) == mine[3]
    assert chosen(TUNED, "scent", rows) is None
    more = Line("tuned", "emoji", 64, ("openclip", "scent"), (1,))
    assert [(each.label, each.note, each.seed) for each in cells_of(more, rows)] == [
        ("openclip", mine[3].note, 1)
    ]
    failed = {**rows, mine[3].name: {**row_of(mine[3], 0.9), "failed": "not finite"}}
    assert best(mine, failed) == mine[4]


def test_a_part_is_decided_when_its_searches_are():
    order = (TUNED, Line("tuned", "emoji", 64, ("openclip", "scent"), (1,)))
    before = part("tuned", "emoji", {}, order)
    assert (len(before.cells), before.evaluated, before.decided) == (12, [], False)
    after = part("tuned", "emoji", rows_of(before.cells), order)
    assert (len(after.cells), after.decided) == (14, True)
    assert [(found.label, found.seed) for found in after.evaluated] == [
        ("openclip", 0), ("scent", 0), ("openclip", 1), ("scent", 1)
    ]  # fmt: skip
    untuned = part("untuned", "emoji", {}, ORDER[:1])
    assert untuned.decided
    assert untuned.cells == untuned.evaluated


def test_the_search_of_the_published_form_goes_on_from_the_best_of_each_stage():
    first = cells_of(PUBLISHED, {})
    assert [found.method["rho"] for found in first] == [3.5, 5.0, 6.5, 8.5]
    rows = rows_of(first) | {first[2].name: row_of(first[2], 0.7)}
    second = cells_of(PUBLISHED, rows)
    assert len(plan(rows, [PUBLISHED])) == 4 + 6 - 1  # one point of the second stage has run
    assert {found.method["rho"] for found in second[4:]} == {6.5}
    pairs = {(each.method["num_prototypes"], each.method["inner_steps"]) for each in second[4:]}
    assert pairs == {(m, steps) for m in (512, 2048, 8192) for steps in (1, 10)}
    rows = complete_search(rows)
    found = chosen(PUBLISHED, "neuclip", rows)
    assert found is not None
    assert found.method["rho"] == 6.5
    assert found.method["restart_steps"] in {round(p * 139_000 / 64) for p in (0.015, 0.1, 0.5, 2)}


def complete_search(rows: dict) -> dict:
    while missing := [each for each in cells_of(PUBLISHED, rows) if each.name not in rows]:
        rows = rows | rows_of(missing)
    return rows


def test_restarts_in_passes_are_steps_of_the_batch():
    point = {**START, "rho": 5.0}
    assert published(point, "icons", 64).method["restart_steps"] == 217
    assert published(point, "icons", 256).method["restart_steps"] == 54
    assert published(point, "icons", 64).name != published({**point, "rho": 6.5}, "icons", 64).name


def test_accumulation_keeps_the_memory():
    cells = part("memory", "icons", {}).cells
    assert {(found.batch, found.accum) for found in cells} == {(64, 4), (64, 16)}
    assert {found.label for found in cells} == {"openclip", "fastclip_v3", "neuclip_pool"}


def test_augmentation_changes_the_images_alone():
    line = Line("augmented", "emoji", 64, ("rgcl_batch",), (0,), longer=3)
    (found,) = cells_of(line, {})
    assert found.name == "emoji_rgcl_batch_lr0.001-rho2-augmented-x3_b64_s0"
    (plain,) = cells_of(replace(line, section="longer"), {})
    assert replace(found, note=plain.note, sections={}) == plain
    read = config(found).data.aug_cfg
    assert (read.scale, read.gray_scale_prob, read.color_jitter_prob) == ((0.6, 1.0), 0.2, 0.8)
    assert config(plain).data.aug_cfg is None


def test_a_bound_of_the_temperature_changes_nothing_else():
    line = Line("bounded", "icons", 64, ("neuclip_pool",), (1,))
    (found,) = cells_of(line, {})
    assert found.name == "icons_neuclip_pool_lr0.001-rho6.5-bound0.03_b64_s1"
    (plain,) = cells_of(replace(line, section="untuned"), {})
    assert replace(found, note=plain.note, method=plain.method) == plain
    read, before = config(found).method, config(plain).method
    assert read.temperature_bounds == (0.03, 1.0)
    assert read.model_copy(update={"temperature_min": 0.01}) == before


def test_a_longer_run_has_more_passes_and_the_same_rate():
    (found,) = cells_of(Line("longer", "emoji", 64, ("openclip",), (0,), longer=3), {})
    short = cell(RECIPES["openclip"], "emoji")
    assert (found.passes, found.evaluated_every) == (24, 6)
    assert found.name == "emoji_openclip_lr0.002-temperature0.015-x3_b64_s0"
    longer, usual = config(found).optim, config(short).optim
    assert longer.epochs == 3 * usual.epochs
    assert (longer.lr, longer.warmup) == (usual.lr, usual.warmup)


def test_negatives_compare_a_batch_with_groups_of_it():
    line = Line("negatives", "icons", 256, ("rgcl_batch",), (0,))
    whole, groups, shared = cells_of(line, {})
    assert whole == cell(RECIPES["rgcl_batch"], "icons", batch=256)
    assert groups.method == {**whole.method, "name": "rgcl_groups", "group_size": 64}
    assert replace(groups, method=whole.method, note=whole.note) == whole
    assert shared.method == {**groups.method, "normalizers": "batch"}
    assert replace(shared, method=groups.method, note=groups.note) == groups
    assert part("negatives", "icons", {}).evaluated == []
