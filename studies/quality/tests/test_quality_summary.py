"""The table that other pages quote."""

from dataclasses import replace

from quality_rows import row_on_test_of, rows_of
from studies.quality.plan import Line, cells_of
from studies.quality.summary import summary

RECIPES = Line("untuned", "emoji", 64, ("neuclip_pool", "rgcl_batch", "openclip", "moco"), (0, 1))
LONGER = Line("longer", "emoji", 64, ("neuclip_pool",), (0,), longer=3)
LARGER = replace(RECIPES, batch=256, seeds=(0,))


def test_a_line_per_split_with_the_mean_over_seeds():
    """The rows on the second split are a tenth better; a larger batch and `moco` are left out."""
    cells = [cell for line in (RECIPES, LONGER, LARGER) for cell in cells_of(line, {})]
    tested = {cell.name: row_on_test_of(cell, 0.4 + 0.02 * cell.seed) for cell in cells}
    by_run = {(cell.label, cell.seed): cell.name for cell in cells_of(RECIPES, {})}
    tested[by_run["rgcl_batch", 1]]["failed"] = "loss is NaN"
    del tested[by_run["openclip", 1]]
    head, _, *lines = summary(rows_of(cells), tested).splitlines()
    assert head.split(" | ")[3:] == [
        "`rgcl_queue`", "`neuclip_pool`", "`rgcl_batch`", "`fastclip_v3`", "`openclip`",
        "outlines |",
    ]  # fmt: skip
    assert lines == [
        "| emoji, 8 passes | unseen vendor | 1 to 2 | - | 41.0 ± 1.4 | 40.0 | - | 40.0 | 21.5 |",
        "| emoji, 8 passes | unseen emoji | 1 to 2 | - | 51.0 ± 1.4 | 50.0 | - | 50.0 | - |",
        "| emoji, 24 passes | unseen vendor | 1 | - | 40.0 | - | - | - | 21.5 |",
        "| emoji, 24 passes | unseen emoji | 1 | - | 50.0 | - | - | - | - |",
    ]


def test_bounded_runs_have_lines_of_their_own_by_length():
    short = Line("bounded", "icons", 64, ("neuclip_pool",), (0, 1))
    longer = replace(short, seeds=(0,), longer=3)
    cells = [cell for line in (short, longer) for cell in cells_of(line, {})]
    tested = {cell.name: row_on_test_of(cell, 0.1 * cell.passes) for cell in cells}
    _, _, *lines = summary(rows_of(cells), tested).splitlines()
    bound = "tau >= 0.03"
    assert [line.split(" | ")[:5] for line in lines[::2]] == [
        [f"| icons, 2 passes, {bound}", "unseen style", "2", "-", "20.0 ± 0.0"],
        [f"| icons, 6 passes, {bound}", "unseen style", "1", "-", "60.0"],
    ]


def test_nothing_is_shown_before_the_first_run():
    assert summary({}, {}) == ""
