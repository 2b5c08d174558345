"""The runner: processes, limits, times."""

import argparse
import json
import time

import pytest
import run
from plan import LEARNING_RATES, tuning_cell

from neuclip.errors import UserError

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
    """A runner whose cells of siglip fail."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    (tmp_path / "demo.json").write_text("{}")
    monkeypatch.setattr(run, "__file__", str(script))
    monkeypatch.setattr(run, "check_machine", lambda *_: None)
    args = argparse.Namespace(out=tmp_path / "study", data=tmp_path, same_code=[])
    args.parallel, args.limit, args.match = 2, None, None
    yield run.Runner(args)


def planned(monkeypatch, labels):
    cells = [tuning_cell(label, 0, LEARNING_RATES[0]) for label in labels]
    monkeypatch.setattr(run, "plan", lambda rows: cells)
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


def test_a_run_without_a_result_stops_the_runner_and_shows_its_log(runner, monkeypatch):
    planned(monkeypatch, ["siglip"])
    with pytest.raises(
        UserError, match=r"exited with code 1 and without a result[\s\S]*no such thing"
    ):
        runner.run()


def test_what_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "available_memory", lambda: 3 * 2**30)
    run.check_machine(tmp_path, 1)
    with pytest.raises(UserError, match=r"needs 4 GiB of memory, 3\.0 GiB are free"):
        run.check_machine(tmp_path, 2)
    with pytest.raises(UserError, match="must be at least 1"):
        run.check_machine(tmp_path, 0)


def test_the_time_of_interrupted_runs_adds_up(tmp_path):
    path = tmp_path / "times.json"
    with pytest.raises(SystemExit), run.Stopwatch(path):
        time.sleep(0.05)
        raise SystemExit(75)
    with run.Stopwatch(path) as watch:
        time.sleep(0.05)
    assert watch.spent["seconds"] > 0.1
    assert json.loads(path.read_text()) == watch.spent
