"""Tables and figures that studies share."""

import pytest
from matplotlib.figure import Figure
from studies.shared.tables import (
    BEGIN,
    END,
    between_markers,
    markdown,
    number,
    percent,
    save_figure,
)

from neuclip.errors import UserError


def test_a_document_keeps_the_text_outside_its_markers(tmp_path):
    path = tmp_path / "study.md"
    begin, end = BEGIN.format(block="small", writer="run.py"), END.format(block="small")
    found = between_markers(f"before\n{begin}\nold\n{end}\nafter\n", "new", path, "run.py", "small")
    assert found == f"before\n{begin}\n\nnew\n{end}\nafter\n"
    with pytest.raises(UserError, match="must each occur once"):
        between_markers("none", "new", path, "run.py", "full")


def test_means_and_spreads():
    assert percent([0.5, 0.6]) == "55.0 ± 7.1"
    assert number([1.234]) == "1.23"
    assert number([None]) == "-"
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown(("a",), []) == ""


def test_equal_figures_are_equal_files(tmp_path):
    contents = []
    for name in ("one", "two"):
        figure = Figure()
        figure.add_subplot().plot([1, 2], [3, 4])
        save_figure(figure, tmp_path / name / "x.svg", "runs")
        contents.append((tmp_path / name / "x.svg").read_bytes())
    assert contents[0] == contents[1]
    save_figure(None, tmp_path / "none.svg", "runs")
    assert not (tmp_path / "none.svg").exists()
