"""Warning signs are functions of the records: once per run and subject, resumed or not."""

import pytest

from neuclip.config.run_config import RunConfig
from neuclip.training.warning_signs import WarningSigns, main_score


def evaluation(step, score, split="val"):
    return {"kind": "eval", "step": step, "split": split, "metrics": {"main_metric": score}}


def training(step, loss):
    return {"kind": "train", "step": step, "loss": loss}


def run(scores, losses, split="val"):
    """Ten steps an epoch: two training records, then an evaluation."""
    records = [evaluation(0, scores[0], split)]
    for epoch, (score, loss) in enumerate(zip(scores[1:], losses, strict=True), start=1):
        records += [training(10 * epoch - 5, loss), training(10 * epoch, loss)]
        records.append(evaluation(10 * epoch, score, split))
    return records


def signs_of(records, watch=None):
    watch = watch or WarningSigns(RunConfig())
    return [(record["step"], sign) for record in records for sign in watch.after(record)]


def test_validation_that_falls_while_the_training_loss_falls_is_overfitting():
    ((step, sign),) = signs_of(run([0.3, 0.6, 0.5, 0.4, 0.35, 0.3], [3, 2, 1.5, 1.2, 1.1]))
    assert (step, sign.name, sign.subject) == (40, "overfitting", "val")
    assert "from 60.0% to 35.0%" in sign.text


@pytest.mark.parametrize(
    ("scores", "losses"),
    [
        ([0.6, 0.5, 0.4, 0.45, 0.4], [3, 2, 1.5, 1]),  # a rise in between
        ([0.6, 0.5, 0.4, 0.4, 0.3], [3, 2, 1.5, 1]),  # a tie in between
        ([0.6, 0.5, 0.4, 0.3], [1, 2, 3]),  # the training loss rises too: it diverges
        ([0.6, 0.5, 0.4], [3, 2]),  # too few
        ([0.6, 0.5, None, 0.3, 0.2], [3, 2, 1.5, 1]),  # not finite
    ],
)
def test_anything_else_is_not_overfitting(scores, losses):
    assert signs_of(run(scores, losses)) == []


def test_a_canary_below_nine_tenths_of_its_start_is_forgetting():
    records = run([0.5, 0.46, 0.449, 0.3], [3, 2, 1], "canary:coco")
    ((step, sign),) = signs_of(records)
    assert (step, sign.name, sign.subject) == (20, "forgetting", "canary:coco")
    assert signs_of(run([0.5, 0.3], [3], "val")) == []
    # Without the starting weights' score nothing is known to be lost.
    assert signs_of(records[1:]) == []


def test_a_resumed_run_warns_as_an_uninterrupted_one():
    records = run([0.3, 0.6, 0.5, 0.4, 0.35, 0.3], [3, 2, 1.5, 1.2, 1.1])
    whole = signs_of(records)
    for place in range(len(records)):
        watch = WarningSigns(RunConfig())
        before = records[:place]
        first = signs_of(before, watch)
        reported = [
            {"kind": "warning", "step": step, "sign": sign.name, "subject": sign.subject}
            for step, sign in first
        ]
        again = WarningSigns(RunConfig(), [*before, *reported])
        assert first + signs_of(records[place:], again) == whole


def test_the_main_score_is_the_recorded_one_else_that_of_the_table():
    assert main_score({"metrics": {"main_metric": 0.2, "acc1": 0.1}}) == 0.2
    assert main_score({"metrics": {"mean_recall@1": 0.1}}) == 0.1
    assert main_score({"metrics": {}}) is None
