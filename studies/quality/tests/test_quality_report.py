"""Tables and figures of the study, and comparisons by paired seeds."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from quality_rows import row_of, row_on_test_of, rows_of
from studies.quality.compare import best_other
from studies.quality.development_report import recipes_table
from studies.quality.figures import (
    HIGHEST,
    accuracy_over_batch,
    accuracy_over_time,
    costs,
    error_over_ratio,
    figures,
)
from studies.quality.plan import Line, cells_of, part
from studies.quality.recipes import RECIPES, cell
from studies.quality.report import NOTHING, RESULTS, WRITER, report, section_table, tables
from studies.quality.rows import CONCEPTS, DEVELOPMENT, DRIFT, TEST, results_file
from studies.quality.summary import BLOCK, summary
from studies.shared.compare import QUANTILES, difference
from studies.shared.tables import between_markers

METHODS = ("neuclip_pool", "rgcl_batch", "openclip")
SCORES = {
    "neuclip_pool": {0: 0.40, 1: 0.42, 2: 0.41},
    "rgcl_batch": {0: 0.39, 1: 0.40, 2: 0.41},
    "openclip": {0: 0.30},
}


def made(batch: int = 64) -> tuple[dict, dict]:
    """Development and test rows on emoji; the other split is a tenth better."""
    cells = [
        cell for cell in part("untuned", "emoji", {}).cells
        if cell.batch == batch and cell.seed in SCORES.get(cell.label, {})
    ]  # fmt: skip
    tested = {cell.name: row_on_test_of(cell, SCORES[cell.label][cell.seed]) for cell in cells}
    return rows_of(cells), tested


@pytest.mark.parametrize("degrees", range(1, len(QUANTILES) + 1))
def test_the_quantiles_are_those_of_students_t(degrees):
    """Against the integral of the density."""
    x = torch.linspace(-QUANTILES[degrees - 1], QUANTILES[degrees - 1], 200_001).double()
    density = torch.distributions.StudentT(float(degrees)).log_prob(x).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(0.95, abs=5e-5)


def test_a_difference_is_taken_at_common_seeds():
    found = difference(SCORES["neuclip_pool"], SCORES["rgcl_batch"])
    assert found is not None
    assert (found.seeds, found.clear) == (3, False)
    assert found.value == pytest.approx(0.01)
    assert found.half == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    single = difference(SCORES["neuclip_pool"], SCORES["openclip"])
    assert single is not None
    assert (single.half, single.clear) == (None, False)
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert best_other("neuclip_pool", SCORES) == "rgcl_batch"
    assert best_other("openclip", SCORES) == "neuclip_pool"
    assert best_other("openclip", {"openclip": {0: 1.0}}) is None


def test_the_table_has_mean_spread_seeds_difference_and_floor():
    text = tables(*made())
    assert (
        "| emoji | `neuclip_pool` | 3 | 41.0 ± 1.0 | +1.0 ± 2.5 (`rgcl_batch`) "
        "| 51.0 ± 1.0 | +1.0 ± 2.5 (`rgcl_batch`) |" in text
    )
    assert "| emoji | `openclip` | 1 | 30.0 | -10.0 (`neuclip_pool`) |" in text
    assert "| emoji | nearest training picture |  | 21.5 |  | - |  |" in text
    assert "A memory of 64 pairs" not in text  # none of its runs is evaluated
    assert "- untuned, emoji: 7 of " in text
    assert "- tuned, icons: 0 of 66 runs trained, and what its search decides; 0 of 0" in text


def test_a_difference_that_excludes_zero_is_bold():
    rows, tested = made()
    for name, row in list(tested.items()):
        if row["label"] == "rgcl_batch":
            tested[name] = row | {
                "evaluations": [
                    each | {"acc1": 0.1 + row["seed"] / 1000} for each in row["evaluations"]
                ]
            }
        if row["label"] == "openclip":
            del tested[name]
    line = "| emoji | `neuclip_pool` | 3 | 41.0 ± 1.0 | **+30.9 ± 2.4** (`rgcl_batch`) |"
    assert line in tables(rows, tested)


def test_failed_runs_are_counted_and_have_no_accuracy():
    rows, tested = made()
    name = next(name for name, row in tested.items() if row["label"] == "openclip")
    rows[name]["failed"] = tested[name]["failed"] = "the loss is nan"
    del tested[name]["evaluations"]
    text = tables(rows, tested)
    assert "| emoji | `openclip` | 0 (1 failed) | - | - | - | - |" in text
    assert f"Failed: {name}: the loss is nan" in text


def test_larger_steps_stand_beside_the_step_that_the_memory_holds():
    rows, tested = made()
    larger = part("memory", "emoji", rows).cells[0]
    assert (larger.label, larger.accum) == ("openclip", 4)
    rows[larger.name] = row_of(larger)
    tested[larger.name] = row_on_test_of(larger, 0.6)
    table = tables(rows, tested).split("### A memory of 64 pairs")[1]
    assert "| emoji | `openclip`, 64 | 1 | 30.0 | -30.0 (`openclip`, 256) |" in table
    assert "| emoji | `openclip`, 256 | 1 | 60.0 | +20.0 (`neuclip_pool`, 64) |" in table
    figure = accuracy_over_time(rows, tested)
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn["openclip"].get_xdata()) == [1.0, costs()["openclip"][256]]
    assert list(drawn["openclip"].get_ydata()) == pytest.approx([35.0, 65.0])


def test_longer_runs_stand_beside_those_of_the_usual_length():
    short = cell(RECIPES["openclip"], "emoji")
    line = Line("longer", "emoji", 64, ("openclip", "neuclip_pool"), (0,), longer=3)
    cells = [short, cell(RECIPES["moco"], "emoji"), *cells_of(line, {})]
    tested = {c.name: row_on_test_of(c, 0.1 * place) for place, c in enumerate(cells, start=1)}
    table = section_table("longer", rows_of(cells), tested)
    assert "| emoji | `openclip`, 8 passes | 1 | 10.0 | - |" in table  # alone at its length
    assert "| emoji | `openclip`, 24 passes | 1 | 30.0 | -10.0 (`neuclip_pool`, 24" in table
    assert "moco" not in table
    assert "passes" not in section_table("untuned", rows_of(cells), tested)


def test_other_batches_stand_beside_the_usual_one():
    larger = cell(RECIPES["openclip"], "emoji", batch=256)
    cells = [cell(RECIPES[method], "emoji") for method in ("openclip", "rgcl_batch")]
    tested = {c.name: row_on_test_of(c, 0.2) for c in cells}
    assert section_table("batches", rows_of(cells), tested) == ""
    tested[larger.name] = row_on_test_of(larger, 0.3)
    table = section_table("batches", rows_of([*cells, larger]), tested)
    assert "| emoji | `openclip`, 64 | 1 | 20.0 | -10.0 (`openclip`, 256)" in table
    assert "| emoji | `openclip`, 256 | 1 | 30.0 | +10.0 (`openclip`, 64)" in table
    assert "rgcl_batch" not in table


def test_augmented_runs_stand_beside_the_same_without():
    lines = [
        Line(section, "emoji", 64, ("openclip", "rgcl_batch"), (0,), longer=3)
        for section in ("longer", "augmented")
    ]
    cells = [cell(RECIPES["openclip"], "emoji"), *(c for line in lines for c in cells_of(line, {}))]
    tested = {c.name: row_on_test_of(c, 0.1 * place) for place, c in enumerate(cells, start=1)}
    table = section_table("augmented", rows_of(cells), tested)
    assert "| emoji | `openclip`, 24 passes | 1 | 20.0 | -10.0 (`rgcl_batch`, 24 passes)" in table
    assert (
        "| emoji | `openclip`, 24 passes, augmented | 1 | 40.0 | -10.0 "
        "(`rgcl_batch`, 24 passes, augmented)"
    ) in table
    assert "8 passes" not in table
    assert "augmented" not in section_table("longer", rows_of(cells), tested)
    assert "| emoji, 24 passes, augmented | `openclip` |" in recipes_table(rows_of(cells))


def test_bounded_runs_stand_beside_all_methods_without():
    lines = [
        Line("untuned", "icons", 64, ("neuclip_pool", "rgcl_batch"), (0, 1, 2)),
        Line("longer", "icons", 64, ("rgcl_batch",), (0,), longer=3),
        Line("bounded", "icons", 64, ("neuclip_pool",), (0, 1)),
    ]
    cells = [c for line in lines for c in cells_of(line, {})]
    scores = {"neuclip_pool": 0.2, "rgcl_batch": 0.3}
    tested = {
        c.name: row_on_test_of(c, 0.4 if "bound" in c.note else scores[c.label]) for c in cells
    }
    table = section_table("bounded", rows_of(cells), tested)
    assert "| icons | `neuclip_pool`, 2 passes | 2 | 20.0 ± 0.0 | **-20.0 ± 0.0** (" in table
    assert (
        "| icons | `neuclip_pool`, 2 passes, tau >= 0.03 | 2 | 40.0 ± 0.0 "
        "| **+10.0 ± 0.0** (`rgcl_batch`, 2 passes) |"
    ) in table
    assert "6 passes" not in table
    assert section_table("untuned", rows_of(cells), tested).count("0.03") == 0
    table = recipes_table(rows_of(cells))
    assert "| icons, tau >= 0.03 | `neuclip_pool` | 2 |" in table


def test_steps_at_other_rates_are_methods_of_their_own():
    rows, tested = made()
    cells = part("memory", "emoji", rows).cells
    both = [each for each in cells if (each.label, each.accum, each.seed) == ("openclip", 16, 0)]
    assert len(both) == 2
    for each, acc1 in zip(both, (0.1, 0.5), strict=True):
        rows[each.name] = row_of(each)
        tested[each.name] = row_on_test_of(each, acc1)
    table = tables(rows, tested).split("### A memory of 64 pairs")[1]
    assert "| emoji | `openclip`, 1,024 | 1 | 10.0 | -40.0 (`openclip`, 1,024, 0.5 of" in table
    assert "| emoji | `openclip`, 1,024, 0.5 of the rate | 1 | 50.0 | +" in table
    figure = accuracy_over_time(rows, tested)
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn["openclip"].get_ydata()) == pytest.approx([35.0, 15.0])


def test_figures_over_batch_and_ratio():
    rows, tested = made()
    drawn = figures(rows, tested)  # of one batch, and no larger step
    assert set(drawn) == {"accuracy_over_batch", "accuracy_over_time", "error_over_ratio"}
    assert set(drawn.values()) == {None}
    more = made(256)
    rows, tested = rows | more[0], tested | more[1]
    figure = accuracy_over_batch(rows, tested)
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn["neuclip_pool"].get_xdata()) == [64, 256]
    assert list(drawn["neuclip_pool"].get_ydata()) == pytest.approx([46.0, 46.0])
    errors = error_over_ratio(rows)
    drawn = {line.get_label(): line for line in errors.axes[0].get_lines()}
    assert list(drawn["neuclip_pool"].get_xdata()) == [11_545 / 256, 11_545 / 64]
    assert list(drawn["neuclip_pool"].get_ydata()) == pytest.approx([1.5 / 9] * 2)
    assert not {"rgcl_batch", "openclip"} & set(drawn)


def test_an_error_above_the_axis_is_an_arrow_with_its_value():
    cells = [
        cell(RECIPES[method], "emoji", batch=batch)
        for method, batch in (("neuclip_pool", 64), ("neuclip_pool", 256), ("infonce_queue", 64))
    ]
    collapsed = {"mse": 900.0, "minibatch_mse": 2.0, "temperature": 0.01}
    rows = rows_of(cells) | {cells[2].name: row_of(cells[2], errors=[collapsed])}
    (panel,) = error_over_ratio(rows).axes
    assert panel.get_ylim()[1] == HIGHEST
    (arrow,) = [line for line in panel.get_lines() if line.get_marker() == "^"]
    assert (list(arrow.get_xdata()), list(arrow.get_ydata())) == ([11_545 / 64], [HIGHEST])
    assert "450" in [text.get_text() for text in panel.texts]


def test_a_report_writes_tables_and_figures(tmp_path, capsys):
    rows, tested = (one | other for one, other in zip(made(), made(256), strict=True))
    for name, each in ((DEVELOPMENT, rows), (TEST, tested)):
        text = "".join(json.dumps(row) + "\n" for row in each.values())
        (tmp_path / name).write_text(text, encoding="utf-8")
    args = SimpleNamespace(
        results=tmp_path, document=None, summaries=[], figures=tmp_path / "figures"
    )
    report(args)
    assert "| emoji | `neuclip_pool` | 3 |" in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"quality_error_over_ratio.svg", "quality_accuracy_over_batch.svg"}


def test_nothing_is_reported_before_the_first_run():
    assert tables({}, {}) == NOTHING


def test_the_page_shows_the_committed_results():
    page = RESULTS.parent / "README.md"
    files = (DEVELOPMENT, TEST, CONCEPTS, DRIFT)
    text = tables(*(results_file(RESULTS / name).read() for name in files))
    content = page.read_text(encoding="utf-8")
    written = between_markers(content, text + "\n", page, WRITER, "the study")
    assert written == content, "write the report again"


@pytest.mark.parametrize("page", ["README.md", "docs/study.md"])
def test_the_tables_of_other_pages_show_the_committed_results(page):
    path = RESULTS.parents[2] / page
    rows, tested = (results_file(RESULTS / name).read() for name in (DEVELOPMENT, TEST))
    content = path.read_text(encoding="utf-8")
    written = between_markers(content, summary(rows, tested) + "\n", path, WRITER, BLOCK)
    assert written == content, "write the report again"
