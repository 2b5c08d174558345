"""The plan: which cells there are, and what decides them."""

from pathlib import Path

import pytest
from made_rows import grids, row_of, with_finals
from studies.default import small
from studies.default.plan import (
    CONTENDERS,
    DEFAULT,
    FULL,
    LEADERS,
    LEARNING_RATES,
    NEXT,
    OURS,
    PEERS,
    PUBLISHED,
    Cell,
    final_score,
    plan,
    tuning_cell,
)
from studies.default.report import best_finals, tables

from neuclip.catalogue.neuclip import NeuCLIPPoolSettings
from neuclip.catalogue.registry import METHODS, method_info
from neuclip.config.resolve import resolve


def test_cells_have_unique_names_and_valid_settings():
    cells = plan(with_finals(grids()))
    stages = {"tune", "final", "ingredient", "reading", "long-ingredient", "batch", "size"}
    assert {cell.stage for cell in cells} == stages
    assert {cell.stage for cell in small.small_plan(with_finals(grids()))} == stages - {
        "long-ingredient"
    }
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert "/" not in cell.name
        if cell.method["name"] in METHODS:  # variants: test_study_ideas.py
            assert resolve(cell.config(Path("data"), Path("logs")), 1).name == cell.name


def test_equal_samples_seen():
    for cell in plan(with_finals(grids())):
        seen = cell.epochs * cell.samples
        long = dict.fromkeys(("final", "long-ingredient"), 12 * FULL)
        budget = {"size": 4 * FULL, "batch": seen, **long}.get(cell.stage, 2 * FULL)
        assert abs(seen - budget) < 0.05 * budget, cell.name


def test_tuning_decides_later_cells():
    assert {cell.stage for cell in plan({})} == {"tune"}
    known = grids(("neuclip_pool",))
    assert {c.method["rho"] for c in plan(known) if c.label == "detached"} == {5.0}
    done = grids(("openclip",))
    finals = [cell for cell in plan(done) if cell.stage == "final"]
    assert {(cell.label, cell.lr, cell.method["temperature"]) for cell in finals} == {
        ("openclip", LEARNING_RATES[1], CONTENDERS["openclip"].temperatures[1]["temperature"])
    }
    assert [cell.seed for cell in finals] == [0]
    done |= {cell.name: row_of(cell) for cell in finals}
    assert sorted(cell.seed for cell in plan(done) if cell.stage == "final") == [0, 1, 2]
    failed = {
        name: {**row, "failed": "not finite"} for name, row in done.items() if "lr0.002" in name
    }
    best = next(cell for cell in plan({**done, **failed}) if cell.stage == "final")
    assert best.lr == LEARNING_RATES[0]


def test_temperatures_within_the_margin_all_run_long():
    def finals(rows: dict, label: str) -> list[Cell]:
        return [cell for cell in plan(rows) if cell.stage == "final" and cell.label == label]

    close = {"lr0.001-t0": 0.495, "lr0.001-t1": 0.5, "lr0.001-t2": 0.47}
    rows = {
        name: {**row, **row_of(cell, close.get(cell.note, 0.3))}
        for label in ("neuclip_pool", "rgcl_batch")
        for name, row in grids((label,)).items()
        for cell in [next(c for c in plan(grids((label,))) if c.name == name)]
    }
    assert [cell.method["rho"] for cell in finals(rows, "neuclip_pool")] == [5.0]
    first, second = finals(rows, "rgcl_batch")
    assert (first.method["rho"], second.method["rho"]) == (3.5, 6.5)
    assert {first.seed, second.seed} == {0}
    rows |= {first.name: row_of(first, 0.6)}
    assert len(finals(rows, "rgcl_batch")) == 2  # no other seed before both have run
    rows |= {second.name: row_of(second, 0.7)}
    third, fourth = finals(rows, "rgcl_batch")[2:]
    assert {(c.method["rho"], c.seed) for c in (third, fourth)} == {(6.5, 1), (6.5, 2)}
    rows |= {third.name: row_of(third, 0.8)}
    text = tables(rows)
    assert "| rgcl_batch | rho 6.5 | 2 | 75.0 ± 7.1 |" in text
    assert "| rgcl_batch | rho 3.5 | 1 | 60.0 |" in text
    assert [(row["note"], row["seed"]) for row in best_finals(list(rows.values()))] == [
        ("rho6.5", 0), ("rho6.5", 1)
    ]  # fmt: skip


def test_a_method_runs_long_before_the_next_grid():
    rows = grids(PEERS[:1])
    cells = [cell for cell in plan(rows) if cell.label in PEERS]
    open_cells = [(cell.stage, cell.label) for cell in cells if cell.name not in rows]
    assert open_cells[:2] == [("final", PEERS[0]), ("tune", PEERS[1])]
    assert {*PEERS, *LEADERS, *NEXT, PUBLISHED} == set(CONTENDERS)


def test_the_higher_rate_is_tried_at_the_best_temperature():
    lower = [tuning_cell("openclip", number, LEARNING_RATES[0]) for number in range(3)]
    rows = {cell.name: row_of(cell, 0.4) for cell in lower[:2]}
    assert all(cell.lr == LEARNING_RATES[0] for cell in plan(rows))
    rows[lower[2].name] = row_of(lower[2], 0.5)
    higher = [cell.name for cell in plan(rows) if cell.lr == LEARNING_RATES[1]]
    assert higher == [tuning_cell("openclip", 2, LEARNING_RATES[1]).name]


def test_the_pool_follows_the_batch_as_the_products_pool():
    cells = [cell for cell in plan(with_finals(grids())) if cell.stage == "batch"]
    ours = [cell for cell in cells if cell.label == DEFAULT]
    assert {cell.batch for cell in ours} == {32, 128, 256}
    for cell in ours:
        product = method_info("neuclip_pool").resolve(NeuCLIPPoolSettings(), cell.batch, None)
        sizes = (cell.method["pool_size"], cell.method["gradient_size"])
        assert sizes == (product.pool_size, product.gradient_size)
    first = {cell.method["pool_size"] for cell in cells if cell.label == OURS}
    assert first == {32 * 256}


def test_score_is_the_mean_of_the_last_values():
    row = row_of(tuning_cell("openclip", 0, 1e-3))
    row["evaluations"] += [{"split": "unseen_face", "acc1": 0.9}]
    assert final_score(row) == pytest.approx((0.9 + 0.5) / 2)
