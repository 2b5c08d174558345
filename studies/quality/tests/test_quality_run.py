"""From the plan to test rows: a run of two cells on small data, and what each command refuses."""

import json
import tarfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from quality_rows import rows_of
from studies.default.data import data_digest
from studies.quality import final as final_module
from studies.quality import run as run_module
from studies.quality.concepts import concepts_table
from studies.quality.datasets import DATA_SETS, EMOJI, GLYPHS, DataFolder
from studies.quality.measure import evaluate_weights
from studies.quality.plan import Line, cells_of
from studies.quality.rows import CONCEPTS, DEVELOPMENT, TEST, weights_of
from studies.shared import runner as runner_module

from neuclip.errors import UserError

ORDER = (
    Line("untuned", "glyphs", 64, ("neuclip_pool",), (0,)),
    Line("untuned", "glyphs", 64, ("moco",), (0,)),
)


@pytest.fixture(autouse=True)
def _short_plan(monkeypatch):
    """Two cells of two steps."""
    short = replace(GLYPHS, passes=1, evaluated_every=1)
    monkeypatch.setitem(DATA_SETS, "glyphs", short)
    for module in (run_module, final_module):
        monkeypatch.setattr(module, "ORDER", ORDER)
    monkeypatch.setattr(runner_module, "check_machine", lambda *_: None)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_cell_is_trained_and_evaluated(demo_dir, tmp_path, capsys):
    data, out = ["--glyphs", str(demo_dir)], tmp_path / "study"
    final = ["final", *data, "--out", str(out), "--section", "untuned", "--data-set", "glyphs"]
    assert run_module.main(["run", *data, "--out", str(out), "--limit", "1"]) == 0
    (row,) = lines(out / DEVELOPMENT)
    cell = cells_of(ORDER[0], {})[0]
    assert row["cell"] == cell.name
    assert [each["split"] for each in row["evaluations"]] == GLYPHS.split_names("development")
    assert row["errors"][0]["mse"] > 0
    assert row["errors"][0]["divergence"] > 0
    assert row["sections"] == {}
    assert row["cpu_seconds"] > 0
    assert row["pairs"] == DataFolder.open(GLYPHS, demo_dir).pairs
    assert not list((out / "cells").iterdir())

    assert run_module.main(final) == 1
    assert "1 of 2 development rows are missing" in capsys.readouterr().err
    assert not (out / TEST).exists()

    assert run_module.main([*final, "--lines", "1"]) == 0
    (evaluated,) = lines(out / TEST)
    assert (evaluated["cell"], evaluated["weights"]) == (cell.name, row["weights"])
    assert [each["split"] for each in evaluated["evaluations"]] == GLYPHS.split_names("test")
    again = evaluate_weights(cell, weights_of(out, cell), [demo_dir / "unseen_face_development"])
    assert again[0]["acc1"] == row["evaluations"][0]["acc1"]
    assert again[0]["mean_recall@1"] == row["evaluations"][0]["mean_recall@1"]

    assert run_module.main([*final, "--lines", "1"]) == 0  # nothing is evaluated twice
    assert len(lines(out / TEST)) == 1
    assert run_module.main(["plan", "--out", str(out)]) == 0
    assert f"done   {cell.name}" in capsys.readouterr().out

    concepts = ["concepts", *data, "--out", str(out)]
    for _ in range(2):  # nothing is measured twice
        assert run_module.main(concepts) == 0
    (measured,) = lines(out / CONCEPTS)
    counts = Counter(names_of(demo_dir / "train"))
    others = sum(count * (count - 1) for count in counts.values()) / counts.total()
    assert measured["shares"]["concept"]["others"] == pytest.approx(others)
    assert all(0 < part < 1 for part in measured["shares"]["concept"]["weight"])
    assert cell.name in concepts_table({cell.name: measured})
    (out / CONCEPTS).unlink()
    (changed,) = lines(out / DEVELOPMENT)
    (out / DEVELOPMENT).write_text(json.dumps({**changed, "weights": "others"}) + "\n")
    assert run_module.main(concepts) == 1
    assert "holds other weights than those of its row" in capsys.readouterr().err


def names_of(folder) -> list[str]:
    """The characters of the pairs in a folder of shards."""
    found = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as shard:
            members = [member for member in shard if member.name.endswith(".json")]
            found += [json.load(shard.extractfile(member))["name"] for member in members]
    return found


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def final_run(demo_dir, tmp_path, monkeypatch):
    """Judges made rows of both cells whose weights are empty files; `5ha` is their digest."""
    out = tmp_path / "study"
    (out / "weights").mkdir(parents=True)
    folder = DataFolder.open(GLYPHS, demo_dir)
    cells = [cell for line in ORDER for cell in cells_of(line, {})]
    rows = rows_of(cells)
    for cell in cells:
        weights_of(out, cell).touch()
        rows[cell.name] |= {"data": folder.digest}
    monkeypatch.setattr(final_module, "present_code", lambda: "c0de")
    monkeypatch.setattr(final_module, "weights_digest", lambda path: "5ha")
    evaluated = [{"split": split, "acc1": 0.5} for split in GLYPHS.split_names("test")]
    monkeypatch.setattr(final_module, "evaluate_weights", lambda *_: [dict(e) for e in evaluated])

    def run(**others) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        (out / DEVELOPMENT).write_text(text, encoding="utf-8")
        args = {"out": out, "section": "untuned", "data_set": "glyphs", "lines": None}
        args |= {"same_code": [], **others}
        final_module.final(SimpleNamespace(**args), {"glyphs": folder})

    return SimpleNamespace(run=run, rows=rows, cells=cells, out=out, monkeypatch=monkeypatch)


def test_a_complete_part_is_evaluated_once(final_run):
    final_run.run()
    assert [row["cell"] for row in lines(final_run.out / TEST)] == [
        cell.name for cell in final_run.cells
    ]
    final_run.run()
    assert len(lines(final_run.out / TEST)) == 2


def test_a_failed_run_is_evaluated_as_failed(final_run):
    final_run.rows[final_run.cells[0].name] |= {"failed": "the loss is not finite", "weights": None}
    final_run.run()
    first, second = lines(final_run.out / TEST)
    assert first["failed"] == "the loss is not finite"
    assert second["evaluations"][0]["acc1"] == 0.5


def test_test_splits_stay_unread_while_a_row_is_missing(final_run):
    del final_run.rows[final_run.cells[1].name]
    with pytest.raises(UserError, match=r"1 of 2 .* are missing .*moco.* --section untuned"):
        final_run.run()
    assert not (final_run.out / TEST).exists()
    with pytest.raises(UserError, match="first 0 lines of the plan have no section untuned"):
        final_run.run(lines=0)
    with pytest.raises(UserError, match=r"section memory on glyphs.*another part"):
        final_run.run(section="memory")


def test_suspects_are_for_choosing_and_evaluated_by_no_test_split(final_run):
    with pytest.raises(UserError, match=r"suspects is for choosing.*for what is chosen"):
        final_run.run(section="suspects")
    assert not (final_run.out / TEST).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "01d"}, r"computed by code 01d.* --same-code 01d"),
        ({"data": "other"}, "was computed on data other"),
        ({"format": 2}, "has format 2, expected 3"),
        ({"weights": "0ther"}, "holds others"),
    ],
)
def test_rows_of_something_else_are_refused(final_run, changes, message):
    final_run.rows[final_run.cells[0].name] |= changes
    with pytest.raises(UserError, match=message):
        final_run.run()
    assert not (final_run.out / TEST).exists()


def test_weights_that_are_gone_or_evaluated_before_as_others_are_refused(final_run):
    weights_of(final_run.out, final_run.cells[1]).unlink()
    with pytest.raises(UserError, match=r"1 of 2 runs have other weights.*\n.*moco.* is missing"):
        final_run.run()
    weights_of(final_run.out, final_run.cells[1]).touch()
    final_run.run()
    final_run.rows[final_run.cells[0].name]["weights"] = "retrained"
    with pytest.raises(UserError, match="its test row is of other weights"):
        final_run.run()


def test_folders_that_are_not_the_data_are_refused(demo_dir, first_glyphs_dir, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--emoji .*pairs.json is missing.*neuclip data emoji"):
        DataFolder.open(EMOJI, demo_dir)
    with pytest.raises(UserError, match=r"without unseen_face_development, .*neuclip data demo"):
        DataFolder.open(GLYPHS, first_glyphs_dir)
    assert run_module.main(["run", "--out", str(tmp_path)]) == 1
    assert "give at least one of --glyphs DIR" in capsys.readouterr().err
    words = ["final", "--out", str(tmp_path), "--section", "untuned", "--data-set", "emoji"]
    assert run_module.main([*words, "--glyphs", str(demo_dir)]) == 1
    assert "--data-set emoji needs --emoji DIR" in capsys.readouterr().err


def test_the_first_study_refuses_todays_glyphs(demo_dir, first_glyphs_dir):
    assert data_digest(first_glyphs_dir)
    with pytest.raises(UserError, match="without the split unseen_face"):
        data_digest(demo_dir)


def test_a_run_stops_if_the_code_changes_under_it(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "present_code", lambda: "new")
    with pytest.raises(UserError, match=r"from old to new.*git worktree"):
        run_module.measure({"code": "old"}, tmp_path)
