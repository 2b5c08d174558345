"""Gain on own data and loss on canaries, against the evaluation before the first step."""

import json

import pytest

from neuclip.report import ReportOptions
from neuclip.report.forgetting import changes
from neuclip.report.page import compose
from neuclip.report.runs import load_runs


def evaluated(folder, split, scores, metric="mean_recall@1", first=0):
    """Appends an evaluation an epoch to a run's records."""
    with (folder / "metrics.jsonl").open("a") as file:
        for epoch, score in enumerate(scores, start=first):
            position = {"step": 10 * epoch, "epoch": epoch, "samples_seen": 1000 * epoch}
            record = {"kind": "eval", **position, "split": split, "metrics": {metric: score}}
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def tuned(runs):
    run = runs.make("tuned")
    evaluated(run, "canary:coco", [0.5, 0.48, 0.40])
    evaluated(run, "val", [0.2, 0.6, 0.55])
    evaluated(run, "imagenet-val", [0.61, 0.60], "acc1")
    evaluated(run, "late", [0.3, 0.4], first=1)
    return run


def test_each_set_is_compared_with_the_starting_weights(tuned):
    found = {change.split: change for change in changes(load_runs([tuned]))}
    assert list(found) == [
        "val",
        "canary:coco",
        "imagenet-val",
    ]  # late has no start
    assert [found[split].difference for split in found] == ["+35.0", "-10.0", "-1.0"]
    assert [found[split].canary for split in found] == [False, True, True]
    assert (found["val"].best, found["val"].best_epoch) == (0.6, 1)
    assert found["val"].points == [(0, 0), (1000, pytest.approx(40)), (2000, pytest.approx(35))]


def test_the_page_shows_gain_and_loss_side_by_side(tuned):
    html = compose([tuned], ReportOptions()).html
    section = html[html.index("Gained and forgotten") : html.index("<h2>Curves")]
    rows = [row for row in section.split("</tr>") if "<code>" in row]
    assert [("+35.0" in row, "-10.0" in row) for row in rows] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    assert section.index("Own data") < section.index("May be forgotten")
    assert "tuned, canary:coco: from 0 to -10.0" in section  # the text of the drawing


def test_without_starting_weights_there_is_no_such_section(runs):
    run = runs.make("scratch")
    evaluated(run, "val", [0.2, 0.6], first=1)
    assert "Gained and forgotten" not in compose([run], ReportOptions()).html


def test_warnings_of_the_run_are_on_the_page(tuned):
    with (tuned / "metrics.jsonl").open("a") as file:
        record = {"kind": "warning", "step": 20, "epoch": 2.0, "sign": "forgetting"}
        file.write(json.dumps({**record, "subject": "x", "text": "<b>forgets</b>"}) + "\n")
    html = compose([tuned], ReportOptions()).html
    assert "after epoch 2: &lt;b&gt;forgets&lt;/b&gt;." in html
