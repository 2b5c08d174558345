"""The runner: processes, limits, times."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from studies.shared import runner as runner_module
from studies.shared.cell_process import Stopwatch
from studies.shared.results_file import ResultsFile
from studies.shared.runner import Runner, Study, check_machine

from neuclip.errors import UserError

CHILD = """
import json, sys
from pathlib import Path
spec = Path(sys.argv[2])
told = json.loads(spec.read_text())
if "siglip" in spec.parent.name:
    sys.exit("no such thing")
(spec.parent / "row.json").write_text(json.dumps({"cell": spec.parent.name, "data": told["data"]}))
"""


@dataclass(frozen=True)
class Cell:
    name: str


def cells(*names: str) -> list[Cell]:
    return [Cell(name) for name in names]


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    """Makes a runner of some cells; a cell named siglip fails."""
    (tmp_path / "child_of_the_runner.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runner_module, "check_machine", lambda *_: None)

    def make(*names: str, limit: int | None = None, match: list[str] | None = None) -> Runner:
        out = tmp_path / "study"
        results = ResultsFile(out / "results.jsonl", (2, {}), "c0de", lambda _: "da7a")
        study = Study("child_of_the_runner", lambda rows: cells(*names), lambda _: {"data": "da7a"})
        args = argparse.Namespace(out=out, parallel=2, limit=limit, match=match)
        return Runner(study, results, args)

    return make


def test_the_runner_goes_through_the_plan(make_runner):
    runner = make_runner("openclip", "sogclr", "scent")
    runner.run()
    assert set(runner.results.read()) == {"openclip", "sogclr", "scent"}
    assert not list((runner.args.out / "cells").iterdir())
    runner.run()  # nothing is left
    assert runner.started == 3


def test_the_runner_stops_at_its_limit(make_runner):
    runner = make_runner("openclip", "sogclr", "scent", limit=2)
    runner.run()
    assert set(runner.results.read()) == {"openclip", "sogclr"}


@pytest.mark.parametrize(
    ("globs", "taken"),
    [(["open*", "sc*"], {"openclip", "scent"}), (["s*"], {"sogclr", "scent"}), (["x"], set())],
)
def test_the_runner_takes_the_cells_it_is_asked_for(make_runner, globs, taken):
    runner = make_runner("openclip", "sogclr", "scent", match=globs)
    runner.run()
    assert set(runner.results.read()) == taken


def test_a_run_without_a_result_stops_the_runner_and_shows_its_log(make_runner):
    with pytest.raises(
        UserError, match=r"exited with code 1 and without a result[\s\S]*no such thing"
    ):
        make_runner("siglip").run()


def test_what_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "available_memory", lambda: 3 * 2**30)
    check_machine(tmp_path, 1)
    with pytest.raises(UserError, match=r"needs 4 GiB of memory, 3\.0 GiB are free"):
        check_machine(tmp_path, 2)
    with pytest.raises(UserError, match="must be at least 1"):
        check_machine(tmp_path, 0)


def test_the_time_of_interrupted_runs_adds_up(tmp_path):
    path = tmp_path / "times.json"
    with pytest.raises(SystemExit), Stopwatch(path):
        time.sleep(0.05)
        raise SystemExit(75)
    with Stopwatch(path) as watch:
        time.sleep(0.05)
    assert watch.spent["seconds"] > 0.1
    assert json.loads(path.read_text()) == watch.spent


def test_a_reader_that_leaves_ends_the_command():
    code = (
        "import sys; from studies.shared.runner import exit_code\n"
        "sys.exit(exit_code(lambda: [print('a line') for _ in range(100_000)]))"
    )
    root = Path(__file__).parents[3]  # where the commands run
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
