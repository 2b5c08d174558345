"""Tables and figures."""

import dataclasses
from pathlib import Path

import pytest
from made_rows import grids, row_of, with_finals
from studies.default.plan import DEFAULT, FULL, plan, tuning_cell
from studies.default.report import (
    WRITER,
    accuracy_over_batch,
    error_over_ratio,
    summary_table,
    tables,
    write_report,
)
from studies.default.rows import results_file
from studies.shared.tables import between_markers

from neuclip.catalogue.create import create_loss
from neuclip.errors import UserError

STUDY = Path(__file__).parents[1]
PAGE = STUDY.parents[1] / "docs" / "study.md"


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


def test_ingredients_are_compared_with_the_base_of_their_seed():
    cells = {
        cell.label: cell for cell in plan(grids()) if cell.stage == "ingredient" and not cell.seed
    }
    rows = {cells[label].name: row_of(cells[label], acc1) for label, acc1 in
            (("base", 0.5), ("detached", 0.45))}  # fmt: skip
    text = tables(rows)
    assert "| detached | 1 | 45.0 | 45.0 | -5.0 | 0.040 |" in text


def test_changes_of_long_runs_are_compared_with_the_final_run():
    rows = with_finals(grids())
    cells = {cell.label: cell for cell in plan(rows) if cell.stage == "long-ingredient"}
    assert cells["fresh-gradient"].method["gradient_size"] == 2048
    assert "gamma_decay_epochs" not in cells["detached"].method
    rows |= {cells["detached"].name: row_of(cells["detached"], 0.45)}
    assert "| detached | 1 | 45.0 | 45.0 | -5.0 | 0.040 | 1.50 | 9.00 |" in tables(rows)


def test_the_default_pool_is_shown_as_the_method():
    rows = with_finals(grids())
    cell = next(cell for cell in plan(rows) if cell.label == DEFAULT)
    assert cell.stage == "long-ingredient"
    rows |= {cell.name: row_of(cell, 0.55)}
    text = tables(rows)
    assert "| neuclip_pool | rho 5 | 1 | 55.0 | 55.0 |" in text
    assert "| neuclip_pool, 32 batches | rho 5 | 1 | 50.0 | 50.0 |" in text
    assert "| `neuclip_pool` | 64 | 1 | 55.0 | 55.0 | 0.167 |" in summary_table(list(rows.values()))
    assert "| 1.50 | 1.00 | -0.50 | 9.00 | 0.167 |" in text
    made = create_loss(
        "neuclip_pool", embed_dim=8, global_batch_size=cell.batch, steps_per_epoch=5, gamma=0.4,
        gamma_decay_epochs=1.0,
    )  # fmt: skip
    sizes = made.normalizer.settings
    assert sizes.size == cell.method["pool_size"]
    assert sizes.gradient_size == cell.method["gradient_size"]


def test_full_and_small_encoders_are_not_mixed():
    cells = [tuning_cell("openclip", number, 1e-3) for number in (0, 1)]
    rows = {cells[0].name: row_of(cells[0]), cells[1].name: row_of(cells[1], towers="small")}
    with pytest.raises(UserError, match="results of full and small encoders are not mixed"):
        write_report(rows, None, None)


def test_no_results_are_reported():
    assert tables({}) == "Nothing has been run.\n"


def test_the_pages_show_the_committed_results():
    committed = {
        name: results_file(STUDY / "results" / f"{name}.jsonl", any_code=True).read()
        for name in ("full", "small")
    }
    for path, block, text in (
        (STUDY / "README.md", "full", tables(committed["full"])),
        (STUDY / "README.md", "small", tables(committed["small"])),
        (PAGE, "summary", summary_table(list(committed["full"].values())) + "\n"),
    ):
        page = path.read_text(encoding="utf-8")
        assert between_markers(page, text, path, WRITER, block) == page, (
            f"{path}: write the report again"
        )


def test_the_summary_fits_on_one_page():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 120


def test_readings_are_compared_with_ours():
    cells = {cell.label: cell for cell in plan(grids()) if cell.stage == "reading"}
    assert cells["prediction-alone"].method == {**cells["as-here"].method, "mixing": "none"}
    rows = {cells[label].name: row_of(cells[label], acc1) for label, acc1 in
            (("as-here", 0.5), ("prediction-alone", 0.42))}  # fmt: skip
    assert "| prediction-alone | 1 | 42.0 | 42.0 | -8.0 | 0.040 | 1.50 | 9.00 |" in tables(rows)
