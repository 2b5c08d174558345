"""The script that rewrites rows in the names of format 2, and the rows that it wrote."""

import json
from pathlib import Path

import pytest
from studies.default.migrate import migrate_file, migrated, migrated_probe, restored
from studies.default.plan import HISTORY, plan
from studies.default.rows import results_file

from neuclip.catalogue.registry import method_info, method_settings

RESULTS = Path(__file__).parents[1] / "results"
FILES = sorted(RESULTS.glob("*.jsonl"))
RENAMED = {"format", "label", "cell", "method", "idea"}

OLD = {
    "format": 1, "code": "c0de", "stage": "tune", "label": "neuclip", "note": "lr0.001-t0",
    "batch": 64, "samples": 46780, "seed": 0, "idea": "", "evaluations": [{"acc1": 0.5}],
    "cell": "tune_neuclip_lr0.001-t0_b64_n46780_s0",
    "method": {
        "name": "neuclip", "refresh": "fifo", "inner_steps": 0, "gradient": "full",
        "num_prototypes": 2048, "gamma": 0.4, "rho": 6.5,
    },
}  # fmt: skip
PAPER = {
    "name": "neuclip", "refresh": "restart", "inner_steps": 10, "gradient": "detached",
    "restart_steps": 32, "num_prototypes": 2048, "gamma": 0.4, "rho": 6.5,
}  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_pool_gets_its_own_name():
    row = migrated(OLD)
    assert row["cell"] == "tune_neuclip_pool_lr0.001-t0_b64_n46780_s0"
    assert row["label"] == "neuclip_pool"
    assert row["method"] == {"name": "neuclip_pool", "pool_size": 2048, "gamma": 0.4, "rho": 6.5}
    assert row["was"] == {key: OLD[key] for key in ("label", "cell", "method", "idea")}
    assert restored(row) == OLD
    assert migrated(row) == row


def test_the_published_method_keeps_the_settings_it_ran_with():
    row = migrated({**OLD, "label": "neuclip-paper", "method": PAPER})
    assert row["label"] == "neuclip"
    assert row["method"] == {
        "name": "neuclip", "num_prototypes": 2048, "restart_steps": 32, "gamma": 0.4, "rho": 6.5,
        "epsilon": 1e-14, "temperature_gradient": "exact",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("idea", "method"),
    [
        ("", {"name": "neuclip_pool", "gradient_size": 8192}),
        ("own-excluded", {"name": "neuclip_pool", "gradient_size": 2048}),
        ("fresh-gradient-rho5", {"name": "pool_own_counted", "gradient_size": 2048}),
    ],
)
def test_a_large_pool_keeps_the_gradient_it_had(idea, method):
    large = {**OLD["method"], "num_prototypes": 8192}
    row = migrated({**OLD, "idea": idea, "method": large})
    assert method.items() <= row["method"].items()


def test_a_trained_pool_is_history():
    row = migrated({**OLD, "label": "trained", "method": {**OLD["method"], "inner_steps": 10}})
    assert row["history"]
    assert row["method"]["name"] == "neuclip_pool_trained"
    assert restored(row)["method"]["inner_steps"] == 10


def test_a_file_is_rewritten_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OLD) + "\n")
    migrate_file(path)
    once = path.read_bytes()
    migrate_file(path)
    assert path.read_bytes() == once


def test_results_of_the_probe_name_the_command_of_today():
    old = {"command": "python benchmarks/normalizer_probe.py --run RUN", "run": {"method": PAPER}}
    new = migrated_probe(old)
    assert new["command"] == "python studies/quality/probe.py --run RUN"
    assert new["was"] == old
    assert migrated_probe(new) == new


# --- the committed rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_rows_are_what_the_script_makes_of_the_old_ones(path):
    for row in rows_of(path):
        assert migrated(restored(row)) == row
        assert set(row.get("was", {})) <= RENAMED


LEFT_THE_PLAN = {
    "full": {
        # The best temperature of the short runs changed when the grid grew.
        "tune_fastclip_v3_lr0.002-t2_b64_n46780_s0", "final_fastclip_v3_rho5_b64_n46780_s0",
        # The default of its time.
        "long-ingredient_fresh-gradient_b64_n46780_s1",
        "long-ingredient_fresh-gradient_b64_n46780_s2",
        "size_fresh-gradient_b64_n46780_s0", "size_fresh-gradient_b64_n5000_s0",
    },
    "small": set(),
}  # fmt: skip
"""Rows of cells that only earlier plans had, except history."""


@pytest.mark.parametrize("name", LEFT_THE_PLAN)
def test_committed_rows_are_cells_of_the_plan_with_its_settings(name):
    rows = results_file(RESULTS / f"{name}.jsonl", any_code=True).read()
    history = {cell for cell, row in rows.items() if row["label"] in HISTORY}
    assert all(rows[cell]["history"] for cell in history)
    cells = {cell.name: cell for cell in plan(rows)}
    assert set(rows) - set(cells) == history | LEFT_THE_PLAN[name]
    for cell in set(rows) & set(cells):
        batch = rows[cell]["batch"]
        assert resolved(rows[cell]["method"], batch) == resolved(cells[cell].method, batch)


def resolved(method: dict, batch: int) -> dict:
    """The settings that a run of the catalogue's methods trains with."""
    name = "neuclip_pool" if method["name"].startswith("pool_") else method["name"]
    settings = method_settings(name, {**method, "name": name})
    found = method_info(name).resolve(settings, batch, None).model_dump()
    if name == "neuclip_pool":  # a gradient from more than the pool holds is the pool's
        found["gradient_size"] = min(found["gradient_size"] or 0, found["pool_size"])
    return {**found, "name": method["name"]}
