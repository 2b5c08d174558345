"""A held-out share, the best checkpoint and early stopping, by the command line."""

import shutil

import pytest

from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.config.data_sections import ReadingConfig
from neuclip.config.recipes import read_yaml
from neuclip.data.opening import open_source
from neuclip.evaluation import evaluate as evaluating_sets
from neuclip.evaluation.held_out import hold_out

from .test_resume import assert_same_checkpoint, comparable


@pytest.fixture
def flags(demo):
    """Four steps an epoch of the training data without --val-data."""

    def make(name, *more):
        line = demo.flags(name, "--epochs", "5", "--workers", "0", "--train-num-samples", "64")
        start = line.index("--val-data")
        return [*line[:start], *line[start + 2 :], "--val-split", "0.2", *more]

    return make


def test_hold_out_keep_the_best_stop_early_and_resume(demo, flags, monkeypatch, capsys):
    """Scores 0.2, 0.3, 0.3, 0.3: epoch 2 is the best, and two misses end the run after epoch 4."""
    by_epoch = {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.3, 5: 0.9}
    inner = evaluating_sets.evaluate
    seen = []

    def evaluate(model, data, settings, class_vectors=None, probes=None):
        found = inner(model, data, settings, class_vectors, probes)
        found.metrics["mean_recall@1"] = by_epoch[seen.count(data.name) % 5 + 1 + offset]
        seen.append(data.name)
        return found

    offset = 0
    monkeypatch.setattr(evaluating_sets, "evaluate", evaluate)
    follow = ("--best-metric", "val/mean_recall@1", "--early-stop", "2", "--save-frequency", "0")
    assert main(["train", *flags("whole", *follow)]) == 0
    output = capsys.readouterr()
    text = output.out + output.err
    assert "held out as the split val: " in text
    assert "stopped early after epoch 4: 2 evaluations without a better val/mean_recall@1" in text
    assert "best val/mean_recall@1: 0.3 after epoch 2" in text
    whole = demo.logs / "whole"
    best = storage.load(whole / "checkpoints/epoch_best.pt")
    assert (best["epoch"], best["neuclip"]["best"]["epoch"]) == (2, 1)  # saved, then evaluated
    # --save-frequency 0 keeps two step checkpoints; the best one stays whatever becomes of them.
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == [
        "SHA256SUMS", "epoch_best.pt", "epoch_latest.pt", "iter_12.pt", "iter_16.pt",
    ]  # fmt: skip
    # What is held out is never read in training: the samples are numbered without it.
    config = read_yaml(whole / "config.yaml")
    held = hold_out(open_source(config["data"]["train_data"]), ReadingConfig(), 0.2, config["seed"])
    assert len(held.rest) == best["neuclip"]["num_samples"]
    assert held.digest == best["neuclip"]["held_out"]

    # Continued from the best checkpoint, the run ends as the one that nothing interrupted.
    seen.clear()
    offset = 2
    folder = shutil.copytree(whole, demo.logs / "continued")
    start = str(folder / "checkpoints/epoch_best.pt")
    assert main(["train", *flags("continued", *follow, "--resume", start)]) == 0
    for file in ("epoch_latest.pt", "epoch_best.pt"):
        assert_same_checkpoint(whole / "checkpoints" / file, folder / "checkpoints" / file)
    assert comparable(folder) == comparable(whole)
    # A run that has stopped early stays stopped.
    capsys.readouterr()
    assert main(["train", *flags("whole", *follow, "--resume", "auto")]) == 0
    assert storage.load(whole / "checkpoints/epoch_latest.pt")["epoch"] == 4
    # A line that leaves the metric out says so, and one that gives it again finds the best epoch.
    by_epoch[5] = 0.1
    share = shutil.copytree(demo.logs / "whole", demo.logs / "share")
    plain = flags("share", "--save-frequency", "0", "--resume", "auto")
    capsys.readouterr()
    assert main(["train", *plain]) == 0
    text = capsys.readouterr().err
    assert "best_metric val/mean_recall@1 -> none, early_stop 2 -> none" in text
    assert "the run followed val/mean_recall@1 until here and does not any more: " in text
    last = storage.load(share / "checkpoints/epoch_latest.pt")
    assert last["epoch"] == 5  # nothing stopped it early
    assert last["neuclip"]["best"]["epoch"] == 2
    assert storage.load(share / "checkpoints/epoch_best.pt")["epoch"] == 2
    again = flags("share", *follow, "--resume", "auto")
    assert main(["train", *again]) == 0
    text = capsys.readouterr().err
    assert "best val/mean_recall@1: 0.3 after epoch 2" in text
    assert "counts from step" not in text
    # Another share is another run.
    assert main(["train", *flags("whole", *follow, "--val-split", "0.3", "--resume", "auto")]) == 2
    assert "has val_split 0.2, this run has 0.3" in capsys.readouterr().err

    # Other commands take it by name.
    monkeypatch.setattr(evaluating_sets, "evaluate", inner)
    assert main(["eval", str(whole), "--best", "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "epoch_best.pt on val" in text
    assert "epoch_2_eval_results.jsonl" in text
