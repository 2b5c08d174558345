"""The study of quality: its plan, its file of results, its tables."""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import normalizer_probe
import pytest
import quality
import quality_small
import torch
from quality_error import error_of, exact_of, training_error
from quality_ideas import IDEAS, using
from quality_plan import (
    CONTENDERS,
    DEFAULT,
    FULL,
    LEADERS,
    LEARNING_RATES,
    NEXT,
    PEERS,
    Cell,
    final_score,
    plan,
    tuning_cell,
)
from quality_report import (
    BEGIN,
    END,
    accuracy_over_batch,
    best_finals,
    between_markers,
    error_over_ratio,
    tables,
    write_report,
)
from quality_results import ResultsFile, code_digest, data_digest, lock
from torch.nn.functional import normalize

from neuclip.catalogue.registry import NeuCLIPSettings
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.method.factory import Run, create_loss, resolve


def row_of(cell: Cell, acc1: float = 0.5, **others) -> dict:
    where = {"samples_seen": 100, "epoch": 1.0}
    splits = ("unseen_face", "unseen_character")
    return {
        "cell": cell.name, "code": "c0de", "data": "da7a", "date": "2026-01-02", "machine": "CPU",
        "stage": cell.stage, "label": cell.label, "note": cell.note, "seed": cell.seed,
        "batch": cell.batch, "samples": cell.samples, "epochs": cell.epochs, "cpu_seconds": 36.0,
        "method": dict(cell.method),
        "evaluations": [
            {**where, "split": split, "acc1": acc1, "mean_recall@1": 0.25} for split in splits
        ],
        "training": [{"samples_seen": 100, "temperature": 0.04}],
        "errors": [{"mse": 1.5, "mae": 1.0, "bias": -0.5, "minibatch_mse": 9.0}],
        **others,
    }  # fmt: skip


def grids(labels=tuple(CONTENDERS), best="lr0.002-t1") -> dict[str, dict]:
    cells = [
        tuning_cell(label, *point)
        for label in labels
        for point in (
            *((number, LEARNING_RATES[0]) for number in range(len(CONTENDERS[label].temperatures))),
            (1, LEARNING_RATES[1]),
        )
    ]
    scores = {"lr0.001-t1": 0.5, best: 0.6}  # the better temperature's higher rate is tried
    return {cell.name: row_of(cell, scores.get(cell.note, 0.4)) for cell in cells}


def with_finals(rows: dict[str, dict]) -> dict[str, dict]:
    """The grids, and the long runs of seed 0 that decide between temperatures."""
    finals = [cell for cell in plan(rows) if cell.stage == "final" and cell.seed == 0]
    return rows | {cell.name: row_of(cell) for cell in finals}


def test_every_cell_has_a_name_of_its_own_and_valid_settings():
    cells = plan(with_finals(grids()))
    stages = {"tune", "final", "ingredient", "long-ingredient", "batch", "size"}
    assert {cell.stage for cell in cells} == stages
    assert {cell.stage for cell in quality_small.small_plan(with_finals(grids()))} == stages - {
        "long-ingredient"
    }
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        config = cell.config(Path("data"), Path("logs")).resolved().check()
        assert config.name == cell.name
        assert "/" not in cell.name


def test_equal_samples_seen():
    for cell in plan(with_finals(grids())):
        seen = cell.epochs * cell.samples
        long = dict.fromkeys(("final", "long-ingredient"), 12 * FULL)
        budget = {"size": 4 * FULL, "batch": seen, **long}.get(cell.stage, 2 * FULL)
        assert abs(seen - budget) < 0.05 * budget, cell.name


def test_what_was_tuned_decides_what_comes_next():
    assert {cell.stage for cell in plan({})} == {"tune"}
    known = grids(("neuclip",))
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


def test_temperatures_that_short_runs_do_not_tell_apart_all_run_long():
    def finals(rows: dict, label: str) -> list[Cell]:
        return [cell for cell in plan(rows) if cell.stage == "final" and cell.label == label]

    close = {"lr0.001-t0": 0.495, "lr0.001-t1": 0.5, "lr0.001-t2": 0.47}
    rows = {
        name: {**row, **row_of(cell, close.get(cell.note, 0.3))}
        for label in ("neuclip", "rgcl_batch")
        for name, row in grids((label,)).items()
        for cell in [next(c for c in plan(grids((label,))) if c.name == name)]
    }
    assert [cell.method["rho"] for cell in finals(rows, "neuclip")] == [5.0]
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


def test_a_peer_runs_long_before_the_grid_of_the_next_begins():
    rows = grids(PEERS[:1])
    cells = [cell for cell in plan(rows) if cell.label in PEERS]
    open_cells = [(cell.stage, cell.label) for cell in cells if cell.name not in rows]
    assert open_cells[:2] == [("final", PEERS[0]), ("tune", PEERS[1])]
    assert {*PEERS, *LEADERS, *NEXT, "neuclip-paper"} == set(CONTENDERS)


def test_the_higher_rate_is_tried_at_the_best_temperature():
    lower = [tuning_cell("openclip", number, LEARNING_RATES[0]) for number in range(3)]
    rows = {cell.name: row_of(cell, 0.4) for cell in lower[:2]}
    assert all(cell.lr == LEARNING_RATES[0] for cell in plan(rows))
    rows[lower[2].name] = row_of(lower[2], 0.5)
    higher = [cell.name for cell in plan(rows) if cell.lr == LEARNING_RATES[1]]
    assert higher == [tuning_cell("openclip", 2, LEARNING_RATES[1]).name]


def test_the_pool_follows_the_batch_as_that_of_the_product_does():
    cells = [cell for cell in plan(with_finals(grids())) if cell.stage == "batch"]
    ours = [cell for cell in cells if cell.label == DEFAULT]
    assert {cell.batch for cell in ours} == {32, 128, 256}
    for cell in ours:
        settings = NeuCLIPSettings(refresh="fifo", gradient="full")
        product = resolve(settings, Run(8, global_batch_size=cell.batch))
        assert isinstance(product, NeuCLIPSettings)
        sizes = (cell.method["num_prototypes"], cell.method["gradient_prototypes"])
        assert sizes == (product.num_prototypes, product.gradient_prototypes)
    first = {cell.method["num_prototypes"] for cell in cells if cell.label == "neuclip"}
    assert first == {32 * 256}


def test_the_batch_table_takes_the_seeds_together():
    rows = with_finals(grids())
    cells = [
        cell
        for cell in plan(rows)
        if (cell.stage, cell.label, cell.batch, cell.epochs) == ("batch", "fastclip_v3", 256, 12)
    ]
    assert {cell.seed for cell in cells} == {0, 1}
    rows |= {cell.name: row_of(cell, 0.5 + cell.seed / 10) for cell in cells}
    text = tables(rows)
    line = "| fastclip_v3 | rho 5 | 12 | 256 | 2 | 55.0 ± 7.1 | 55.0 ± 7.1 | 1.50 ± 0.00 |"
    assert line in text
    other = {**cells[0].method, "rho": 9.0}
    rows["other"] = row_of(dataclasses.replace(cells[0], method=other, note="e12-rho9"), 0.1)
    assert "| fastclip_v3 | rho 9 | 12 | 256 | 1 | 10.0 | 10.0 |" in tables(rows)
    sizes = [cell for cell in plan(rows) if cell.stage == "size" and cell.label == "fastclip_v3"]
    twice = [{"mse": 3.0, "minibatch_mse": 9.0}]  # shorter runs at the same n / B are kept apart
    rows |= {cell.name: row_of(cell, errors=twice) for cell in sizes if cell.samples == FULL}
    table = tables(rows).split("### Batch sizes")[1]
    assert "| fastclip_v3 | rho 5 | 4 | 64 | 1 | 50.0 | 50.0 | 3.00 | 9.00 |" in table
    assert table.index("| 4 | 64 |") < table.index("### Data sizes")
    expected = {
        accuracy_over_batch: ([64, 256], [50, 55]),
        error_over_ratio: ([FULL / 256, FULL / 64], [1 / 6, 1 / 6]),
    }
    for draw, (x, y) in expected.items():
        figure = draw(list(rows.values()))
        assert figure is not None
        lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
        assert list(lines["fastclip_v3"].get_xdata()) == x
        assert list(lines["fastclip_v3"].get_ydata()) == pytest.approx(y)


def test_score_is_the_mean_of_the_last_values():
    row = row_of(tuning_cell("openclip", 0, 1e-3))
    row["evaluations"] += [{"split": "unseen_face", "acc1": 0.9}]
    assert final_score(row) == pytest.approx((0.9 + 0.5) / 2)


# --- the file -----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> ResultsFile:
    return ResultsFile(tmp_path / "results.jsonl", "da7a")


def test_rows_come_back_and_a_torn_line_is_dropped(results):
    results.append({"cell": "one", "data": "da7a"})
    with results.path.open("a") as file:
        file.write('{"format": 1, "cell": "to')
    assert list(results.read()) == ["one"]
    results.append({"cell": "two", "data": "da7a"})
    assert list(results.read()) == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "has format 0, this script writes format 1"),
        ({"code": "01d"}, "computed by code 01d, this is .* --same-code 01d"),
        ({"data": "other"}, "is of the data other, these are da7a"),
    ],
)
def test_other_versions_are_refused(results, changes, message):
    results.append({"cell": "one", "data": "da7a"})
    row = json.loads(results.path.read_text())
    results.path.write_text(json.dumps({**row, **changes}) + "\n")
    with pytest.raises(UserError, match=message):
        results.read()
    with pytest.raises(UserError, match=r"results\.jsonl, line 1"):
        results.read()


def test_code_that_is_said_to_be_equal_is_accepted(results):
    results.append({"cell": "one", "data": "da7a"})
    row = json.loads(results.path.read_text())
    results.path.write_text(json.dumps({**row, "code": "01d"}) + "\n")
    assert list(ResultsFile(results.path, "da7a", ["01d"]).read()) == ["one"]


def test_lines_that_are_no_results_are_refused(results):
    results.path.write_text("[]\n")
    with pytest.raises(UserError, match="format None"):
        results.read()
    results.path.write_text("{\n")
    with pytest.raises(UserError, match="not JSON"):
        results.read()


def test_the_digest_sees_code_and_not_words(tmp_path):
    path = tmp_path / "method" / "loss.py"
    path.parent.mkdir()

    def digest(text: str) -> str:
        path.write_text(text)
        return code_digest(tmp_path)

    one = digest('"""Text."""\nx = 1\n')
    assert digest('"""Other text."""\n\n# why\nx = 1  # here\n') == one
    assert digest('"""Text."""\nx = 2\n') != one


def test_no_data_and_a_second_runner_are_refused(tmp_path):
    with pytest.raises(UserError, match="no embedded data there"):
        data_digest(tmp_path)
    with lock(tmp_path), pytest.raises(UserError, match="another run of this script"):
        lock(tmp_path)


RUN = """
import json, sys
from pathlib import Path
spec = Path(sys.argv[2])
name = spec.parent.name
if "siglip" in name:
    sys.exit("no such thing")
(spec.parent / "row.json").write_text(json.dumps({"cell": name}))
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Of two sorts of runs: those of siglip fail."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    (tmp_path / "demo.json").write_text("{}")
    monkeypatch.setattr(quality, "__file__", str(script))
    monkeypatch.setattr(quality, "check_machine", lambda *_: None)
    args = argparse.Namespace(out=tmp_path / "study", data=tmp_path, same_code=[])
    args.parallel, args.limit, args.match = 2, None, None
    yield quality.Runner(args)


def planned(monkeypatch, labels):
    cells = [tuning_cell(label, 0, LEARNING_RATES[0]) for label in labels]
    monkeypatch.setattr(quality, "plan", lambda rows: cells)
    return [cell.name for cell in cells]


def test_the_runner_goes_through_the_plan(runner, monkeypatch):
    names = planned(monkeypatch, ["openclip", "sogclr", "scent"])
    runner.run()
    assert set(runner.results.read()) == set(names)
    assert not list((runner.args.out / "cells").iterdir())
    runner.run()  # nothing is left
    assert runner.started == 3


def test_the_runner_stops_at_its_limit(runner, monkeypatch):
    names = planned(monkeypatch, ["openclip", "sogclr", "scent"])
    runner.args.limit = 2
    runner.run()
    assert set(runner.results.read()) == set(names[:2])


@pytest.mark.parametrize(
    ("globs", "taken"),
    [(["*_openclip_*", "*_scent_*"], {0, 2}), (["tune_s*"], {1, 2}), (["x"], set())],
)
def test_the_runner_takes_the_cells_it_is_asked_for(runner, monkeypatch, globs, taken):
    names = planned(monkeypatch, ["openclip", "sogclr", "scent"])
    runner.args.match = globs
    runner.run()
    assert set(runner.results.read()) == {names[place] for place in taken}


def test_a_run_without_a_result_stops_the_runner_and_tells_its_last_words(runner, monkeypatch):
    planned(monkeypatch, ["siglip"])
    with pytest.raises(UserError, match=r"code 1 and without a result[\s\S]*no such thing"):
        runner.run()


def test_what_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "available_memory", lambda: 3 * 2**30)
    quality.check_machine(tmp_path, 1)
    with pytest.raises(UserError, match=r"needs 4 GiB of memory, 3\.0 GiB are free"):
        quality.check_machine(tmp_path, 2)
    with pytest.raises(UserError, match="must be at least 1"):
        quality.check_machine(tmp_path, 0)


def test_the_time_of_interrupted_runs_adds_up(tmp_path):
    path = tmp_path / "times.json"
    with pytest.raises(SystemExit), quality.Stopwatch(path):
        time.sleep(0.05)
        raise SystemExit(75)
    with quality.Stopwatch(path) as watch:
        time.sleep(0.05)
    assert watch.spent["seconds"] > 0.1
    assert json.loads(path.read_text()) == watch.spent


# --- the tables ---------------------------------------------------------------------------------


def test_tables_show_means_spreads_and_what_is_missing():
    rows = with_finals(grids())
    finals = [cell for cell in plan(rows) if cell.stage == "final" and cell.label == "siglip"]
    rows |= {cell.name: row_of(cell, 0.4 + cell.seed / 10) for cell in finals}
    text = tables(rows)
    assert (
        "| siglip | temperature 0.05 | 3 | 50.0 ± 10.0 | 50.0 ± 10.0 | 25.0 ± 0.0 | 1.50 ± 0.00 |"
        in text
    )
    assert "Not run yet: " in text
    assert f"{len(rows)} runs, 2026-01-02 to 2026-01-02" in text
    assert "| openclip | temperature 0.03 | 50.0 | 60.0 |" in text


def test_ingredients_stand_beside_the_base_of_their_seed():
    cells = {
        cell.label: cell for cell in plan(grids()) if cell.stage == "ingredient" and not cell.seed
    }
    rows = {cells[label].name: row_of(cells[label], acc1) for label, acc1 in
            (("base", 0.5), ("detached", 0.45))}  # fmt: skip
    text = tables(rows)
    assert "| detached | 1 | 45.0 | 45.0 | -5.0 | 0.040 |" in text


def test_changes_of_long_runs_stand_beside_the_final_run():
    rows = with_finals(grids())
    cells = {cell.label: cell for cell in plan(rows) if cell.stage == "long-ingredient"}
    assert cells["fresh-gradient"].method["gradient_prototypes"] == 2048
    assert "gamma_decay_epochs" not in cells["detached"].method
    rows |= {cells["detached"].name: row_of(cells["detached"], 0.45)}
    assert "| detached | 1 | 45.0 | 45.0 | -5.0 | 0.040 | 1.50 | 9.00 |" in tables(rows)


def test_the_pool_that_has_become_the_default_is_shown_as_the_method():
    rows = with_finals(grids())
    cell = next(cell for cell in plan(rows) if cell.label == DEFAULT)
    assert cell.stage == "long-ingredient"
    rows |= {cell.name: row_of(cell, 0.55)}
    text = tables(rows)
    assert "| neuclip | rho 5 | 1 | 55.0 | 55.0 |" in text
    assert "| neuclip, 32 batches | rho 5 | 1 | 50.0 | 50.0 |" in text
    assert "| 1.50 | 1.00 | -0.50 | 9.00 | 0.167 |" in text
    made = create_loss(
        "neuclip", embed_dim=8, global_batch_size=cell.batch, steps_per_epoch=5, gamma=0.4,
        gamma_decay_epochs=1.0,
    )  # fmt: skip
    network = made.normalizer.settings
    assert network.num_prototypes == cell.method["num_prototypes"]
    assert network.gradient_prototypes == cell.method["gradient_prototypes"]


def test_a_document_keeps_what_is_outside_of_its_markers(tmp_path):
    path = tmp_path / "study.md"
    begin, end = BEGIN.format(block="small"), END.format(block="small")
    found = between_markers(f"before\n{begin}\nold\n{end}\nafter\n", "new", path, "small")
    assert found == f"before\n{begin}\n\nnew\n{end}\nafter\n"
    with pytest.raises(UserError, match="must each occur once"):
        between_markers("none", "new", path)


def test_two_kinds_of_towers_are_refused():
    cells = [tuning_cell("openclip", number, 1e-3) for number in (0, 1)]
    rows = {cells[0].name: row_of(cells[0]), cells[1].name: row_of(cells[1], towers="small")}
    with pytest.raises(UserError, match="results of full and small towers are not mixed"):
        write_report(rows, None, None)


def test_no_results_are_said():
    assert tables({}) == "Nothing has been run.\n"


# --- the error, and ideas -----------------------------------------------------------------------


def test_exact_normalizers_are_those_of_a_double_loop():
    features = normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1)
    found = exact_of(features, torch.tensor([4, 1]), 7.0, 1e-3)
    for side in (0, 1):
        for column, i in enumerate((4, 1)):
            similarity = features[side, i] @ features[1 - side].T
            own = math.exp(0) * similarity[i]
            others = [math.exp(7 * float(similarity[j] - own)) for j in range(6) if j != i]
            expected = math.log(1e-3 + sum(others) / 5)
            assert float(found[side, column]) == pytest.approx(expected)


def test_the_batch_normalizer_has_the_error_of_the_batch():
    features = normalize(torch.randn(2, 40, 4), dim=-1)
    loss = create_loss("rgcl_batch", embed_dim=4)
    error = error_of(features, torch.arange(40), loss, 9.0, batch=8, anchors=24)
    assert error["anchors"] == 24
    for key in ("mse", "mae", "bias"):
        assert error[key] == pytest.approx(error[f"minibatch_{key}"], abs=1e-3)
    assert error["mse"] > 0


@pytest.mark.parametrize("method", ["isogclr", "fastclip_v2"])
def test_individual_temperatures_are_those_the_error_is_measured_at(method):
    """With an own temperature per anchor, and normalizers that are exact at it: no error."""
    features = normalize(torch.randn(2, 40, 4), dim=-1)
    ids = torch.arange(40) + 3
    settings = {"gamma": 0.5, "gamma_schedule": "constant"} if method == "fastclip_v2" else {}
    loss = create_loss(method, embed_dim=4, num_samples=43, steps_per_epoch=5, **settings)
    temperatures = torch.rand(2, 40) / 10 + 0.02
    loss.temperature.table.values[:2, ids] = temperatures
    exact = exact_of(features, torch.arange(40), 1 / temperatures, 0.0)
    one = exact_of(features, torch.tensor([7]), float(1 / temperatures[1, 7]), 0.0)
    assert float(exact[1, 7]) == pytest.approx(float(one[1]))
    loss.normalizer.table.values[:, ids] = exact.float()
    error = error_of(features, ids, loss, 9.0, batch=8, anchors=24)
    assert abs(error["mse"]) < 1e-3
    assert error["minibatch_mse"] > 0.05


def test_every_estimator_of_the_probe_is_finite_and_more_prototypes_are_better(monkeypatch):
    monkeypatch.setattr(normalizer_probe, "ANCHORS", 128)
    monkeypatch.setattr(normalizer_probe, "POOL", 2048)
    features = normalize(torch.randn(2, 2500, 8), dim=-1)
    probe = normalizer_probe.Probe(features, 10.0, seed=0)
    mse = {
        name: float((estimate(probe) - probe.exact).square().mean())
        for name, estimate in normalizer_probe.estimators(steps=2).items()
    }
    assert all(math.isfinite(value) for value in mse.values()), mse
    assert mse["pool, m 2048"] < mse["pool, m 512"] < mse["pool, m 64"]
    assert mse["pool 2048 and batch, by counts"] < mse["batch of 64"]


def test_the_error_over_all_training_pairs_of_a_run(demo_dir, tmp_path):
    flags = ["--train-data", str(demo_dir / "train"), "--method", "fastclip_v3", "--smoke"]
    flags += ["--logs", str(tmp_path), "--name", "run", "--device", "cpu"]
    assert main(["train", *flags]) == 0
    error = training_error(tmp_path / "run", 2)
    assert error["anchors"] == 512
    assert 0 < error["mse"] < 10
    assert 0 < error["minibatch_mse"] < 10
    assert error["temperature"] == pytest.approx(0.07, abs=0.01)


def test_small_towers_learn_and_are_judged(demo_dir):
    data = quality_small.Data(demo_dir)
    method = {"name": "neuclip", "num_prototypes": 128}
    run = quality_small.SmallRun(Cell("tune", "x", method, 1e-3, batch=16, measures=True), data)
    run.steps = 20
    run.cell = dataclasses.replace(run.cell, epochs=2)
    found = run.train()
    assert {row["split"] for row in found["evaluations"]} == set(quality_small.SPLITS)
    assert all(math.isfinite(row["mse"]) for row in found["errors"])


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_is_what_neuclip_is_built_with_inside(idea):
    settings = {
        "num_prototypes": 64,
        "inner_steps": 0,
        "refresh": "fifo",
        "gradient": "full",
        "gamma": 0.4,
        "gamma_decay_epochs": 1.0,
        "log_weights": idea == "age-weights",
    }

    def build():
        return create_loss("neuclip", embed_dim=8, steps_per_epoch=2, **settings)

    with using(idea):
        loss = build()
    assert type(loss.normalizer) is IDEAS[idea]
    assert type(build().normalizer) not in IDEAS.values()
    for _ in range(12):
        features = normalize(torch.randn(2, 8, 8), dim=-1).requires_grad_()
        value = loss(features[0], features[1], torch.tensor(10.0))
        value.backward()
    assert torch.isfinite(features.grad).all()
