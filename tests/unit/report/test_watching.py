"""`neuclip report --watch`, with a run that writes when the command waits."""

import json

import pytest

from neuclip.cli import report as command
from neuclip.cli.app import main
from neuclip.cli.report import with_seconds
from neuclip.errors import UserError
from neuclip.parallel import folder_lock
from neuclip.report.watching import stamp, watch

RELOADS = '<meta http-equiv="refresh" content="30">'


class Run:
    """A run that goes on for some waits; each event of a wait is called while it is waited."""

    def __init__(self, events):
        self.events, self.written, self.said, self.stamp = list(events), [], [], 0

    def watched(self, write=None):
        return watch(
            write or self.written.append,
            lambda: ((None, self.stamp, 0),),
            lambda: bool(self.events),
            self.wait,
            self.said.append,
        )

    def wait(self):
        self.events.pop(0)()

    def change(self):
        self.stamp += 1

    def nothing(self):
        pass


def interrupt():
    raise KeyboardInterrupt


def test_pages_follow_changes_and_the_last_one_is_final():
    run = Run([])
    run.events = [run.change, run.nothing, run.nothing, run.change]
    assert run.watched()
    assert run.written == [True, True, False]


def test_a_run_that_does_not_go_on_gets_one_page():
    run = Run([])
    assert run.watched() and run.written == [False]


def test_interrupted():
    run = Run([interrupt])
    assert not run.watched() and run.written == [True, False]


def test_a_page_that_fails_is_tried_again():
    run, tries = Run([]), []
    run.events = [run.change, run.nothing, run.change]

    def write(again):
        tries.append(again)
        if len(tries) == 2:
            raise UserError("no space left on the device")

    assert run.watched(write)
    assert tries == [True, True, False]
    assert run.said == [
        "no space left on the device; the page is tried again after the next change"
    ]


def test_the_first_failure_ends_it():
    run = Run([interrupt])

    def write(again):
        raise UserError("not a run folder")

    with pytest.raises(UserError, match="not a run folder"):
        run.watched(write)


def test_records_and_results_change_the_stamp(runs):
    run = runs.make("first")
    seen = [stamp([run])]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    seen.append(stamp([run]))
    runs.evaluate_split(run, 0.5)
    seen.append(stamp([run]))
    (run / "out.log").write_text("a line of the log")
    assert len(set(seen)) == 3 and stamp([run]) == seen[-1]
    assert stamp([run / "gone"]) == ()


@pytest.mark.parametrize("end", ["finished", "Ctrl-C"])
def test_the_command(runs, tmp_path, monkeypatch, capsys, end):
    run, out, pages = runs.make("first"), tmp_path / "page.html", []
    holders = ["process 812", "process 812", None]
    monkeypatch.setattr(folder_lock, "holder_of", lambda folder: holders.pop(0))

    def sleep(seconds):
        assert seconds == 30
        pages.append(out.read_text())
        record = {"kind": "train", "step": 90, "epoch": 9.0, "samples_seen": 9000, "loss": 0.5}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if end == "Ctrl-C":
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["report", str(run), "--out", str(out), "--watch"]) == 0
    assert len(set(pages)) == len(pages) == (2 if end == "finished" else 1)
    assert all(RELOADS in page and "this page reloads every 30 s" in page for page in pages)
    final = out.read_text()
    assert "http-equiv" not in final and "reloads" not in final
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n" and "(Ctrl-C stops it)" in shown.err
    assert ("no run goes on" in shown.err) == (end == "finished")
    assert main(["report", str(run), "--out", str(tmp_path / "plain.html")]) == 0
    assert (tmp_path / "plain.html").read_text() == final


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        ("logs/a --watch", "logs/a --watch 30"),
        ("--watch logs/a --out x", "--watch 30 logs/a --out x"),
        ("logs/a --watch 5 --published", "logs/a --watch 5 --published"),
        ("logs/a --watch=5", "logs/a --watch=5"),
        ("logs/a --watch -5", "logs/a --watch -5"),
    ],
)
def test_seconds_may_be_left_out(given, expected):
    assert with_seconds(given.split()) == expected.split()


def test_seconds_are_checked(runs, capsys):
    run = runs.make("first")
    assert main(["report", str(run), "--watch", "0"]) == 2
    assert "--watch: 0 is out of range; it must be >= 1" in capsys.readouterr().err
