"""The runs of a folder, one line each."""

import json
import os
import signal

import pytest

from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.parallel.folder_lock import FolderLock, holder_of
from neuclip.report.run_list import list_runs


def nobody(folder):
    return None


def evaluated(run, split, **by_epoch):
    with (run / "metrics.jsonl").open("a") as file:
        for epoch, metrics in by_epoch.items():
            number = int(epoch.removeprefix("e"))
            record = {"kind": "eval", "step": 10 * number, "epoch": number, "split": split}
            file.write(json.dumps({**record, "metrics": metrics}) + "\n")


def test_progress_best_and_state(runs):
    data = {"train_data": "/some/where/cc3m/train::/other/set"}
    done = runs.make("done", "siglip", optim={"epochs": 8}, data=data)
    evaluated(done, "a", e1={"acc1": 0.5}, e2={"acc1": 0.75}, e3={"acc1": 0.75})
    half = runs.make("half", optim={"epochs": 16}, evaluation={"best_metric": "b/val_loss"})
    evaluated(half, "a", e1={"acc1": 0.5})
    evaluated(half, "b", e1={"val_loss": 2.0}, e2={"val_loss": 1.25}, e3={"val_loss": 3.0})
    early = runs.make("early", optim={"epochs": 16})
    (early / "out.log").write_text("x\n2026-11-28 17:24:33,876 | INFO | finished: logs/early\n")
    (runs.folder / "broken").mkdir()
    (runs.folder / "broken" / "config.yaml").write_text("[")
    (runs.folder / "notes").mkdir()
    broken, first, second, third = list_runs(runs.folder, nobody)
    assert broken.name == "broken" and broken.state.startswith("unreadable: ")
    assert (first.method, first.data) == ("siglip", "cc3m/train::other/set")
    assert (first.progress, first.state) == ("8 of 8 epochs", "finished")
    assert first.best == "a/acc1 75.00 % after epoch 2"
    assert (second.name, second.progress, second.state, second.best) == (
        "early", "8 of 16 epochs", "finished", "",
    )  # fmt: skip
    assert third.state == "stopped" and third.best == "b/val_loss 1.25 after epoch 2"
    evaluated(half, "a", e16={"acc1": 0.5})  # later than the last training record
    assert list_runs(half, nobody)[0].progress == "16 of 16 epochs"
    (alone,) = list_runs(done, lambda folder: "somebody")
    assert (alone.name, alone.state) == ("done", "running (somebody)")


def test_the_best_value_by_auto_is_of_the_first_validation_data(runs):
    run = runs.make("tuned", evaluation={"best_metric": "auto"})
    evaluated(run, "canary:old", e1={"acc1": 0.9})
    evaluated(run, "b", e1={"mean_recall@1": 0.5}, e2={"mean_recall@1": 0.25})
    (found,) = list_runs(run, nobody)
    assert found.best == "b/mean_recall@1 50.00 % after epoch 1"


def test_the_lock_says_who_is_running(runs, capsys):
    run = runs.make("locked")
    assert holder_of(run) is None
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            FolderLock().acquire(run)
            os.write(told, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(ready, 1)
        assert f"process {child} on" in holder_of(run)
        assert main(["runs", str(runs.folder)]) == 0
        assert f"running (process {child} on" in capsys.readouterr().out
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert holder_of(run) is None  # the file is still there
    lock = run / "run.lock"
    lock.write_text(json.dumps({"host": "far", "pid": 7, "machine": "another"}))
    assert holder_of(run) == "process 7 on 'far', or it was"


def test_folders_without_runs(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "nowhere", nobody)
    with pytest.raises(UserError, match="holds no run"):
        list_runs(tmp_path, nobody)
