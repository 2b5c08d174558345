"""The best value, its epoch and the misses: over resumes, ties, NaN and both directions."""

import math

import pytest

from neuclip.config.sections import EvaluationConfig
from neuclip.data.sources.synthetic import SyntheticSource
from neuclip.errors import UserError
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.training.best_metric import BestMetric, choose_metric


def follow(best, values, first=1):
    return [best.update(v, 10 * epoch, epoch) for epoch, v in enumerate(values, start=first)]


def test_only_a_strictly_better_value_is_the_best():
    best = BestMetric("val", "acc1")
    assert follow(best, [0.2, 0.2, 0.5, 0.4, math.nan, 0.5]) == [
        True, False, True, False, False, False,
    ]  # fmt: skip
    assert (best.value, best.step, best.epoch, best.misses) == (0.5, 30, 3, 3)


def test_a_loss_is_better_when_lower():
    best = BestMetric("val", "val_loss")
    assert follow(best, [2.0, 1.0, 1.5, 0.5]) == [True, True, False, True]
    assert best.value == 0.5


def test_the_run_stops_after_the_given_number_of_misses_in_a_row():
    best = BestMetric("val", "acc1", early_stop=2)
    assert not best.stops
    stops = []
    for epoch, value in enumerate([0.5, 0.4, 0.6, 0.5, 0.6], start=1):
        best.update(value, epoch, epoch)
        stops.append(best.stops)
    assert stops == [False, False, False, False, True]
    assert not BestMetric("val", "acc1").stops


def test_the_starting_weights_are_a_reference_and_not_a_checkpoint():
    best = BestMetric("val", "acc1", early_stop=1)
    assert follow(best, [0.9, 0.5], first=0) == [False, True]
    assert "starting weights: 0.9" in best.summary()
    assert "did not improve" in best.summary()
    assert not best.improves
    best.update(0.95, 20, 2)
    assert best.improves
    assert "did not improve" not in best.summary()


@pytest.mark.parametrize("cut", range(6))
def test_a_restored_state_goes_on_as_the_first(cut):
    values = [0.3, 0.2, 0.5, math.nan, 0.6, 0.1]
    whole, before, after = (BestMetric("val", "acc1", 2) for _ in range(3))
    expected = follow(whole, values, first=0)
    found = follow(before, values[:cut], first=0)
    after.load_state_dict(before.state_dict())
    assert found + follow(after, values[cut:], first=cut) == expected
    assert after.state_dict() == whole.state_dict()


def splits(**classes):
    source = SyntheticSource("synthetic:4")
    return [EvaluationSplit(name, source, given, []) for name, given in classes.items()]


def test_names_are_checked_against_the_sets_before_training():
    sets = splits(val=[], birds=["wren", "robin"])
    chosen = choose_metric(EvaluationConfig(best_metric="birds/acc1", early_stop=3), sets)
    assert (chosen.split, chosen.metric) == ("birds", "acc1")
    with pytest.raises(UserError, match=r"val/acc1 is not .* has: val/mean_recall@1, val/val_loss"):
        choose_metric(EvaluationConfig(best_metric="val/acc1"), sets)
    with pytest.raises(UserError, match="evaluates nothing; add --val-data or --val-split"):
        choose_metric(EvaluationConfig(best_metric="val/acc1"), [])
    assert choose_metric(EvaluationConfig(), sets) is None


def test_auto_takes_the_main_metric_of_the_first_validation_data():
    config = EvaluationConfig(best_metric="auto", early_stop=3)
    for sets, name in (
        (splits(birds=["wren"], val=[]), "birds/acc1"),
        (splits(val=[], birds=["wren"]), "val/mean_recall@1"),
        (splits(**{"canary:old": ["wren"], "val": []}), "val/mean_recall@1"),
    ):
        chosen = choose_metric(config, sets)
        assert (chosen.name, chosen._early_stop) == (name, 3)
    with pytest.raises(UserError, match="canaries alone: add --val-data"):
        choose_metric(config, splits(**{"canary:old": []}))
    with pytest.raises(UserError, match="evaluates nothing"):
        choose_metric(config, [])


def test_a_name_may_hold_slashes():
    (coco,) = splits(**{"canary:coco/val": []})
    chosen = choose_metric(EvaluationConfig(best_metric="canary:coco/val/mean_recall@1"), [coco])
    assert (chosen.split, chosen.metric) == ("canary:coco/val", "mean_recall@1")


def test_a_metric_that_the_evaluation_lacks_is_an_error():
    with pytest.raises(UserError, match="has only acc1, chance"):
        BestMetric("val", "acc5").value_in({"acc1": 0.5, "chance": 0.1})


def test_early_stop_needs_a_metric():
    with pytest.raises(UserError, match=r"--early-stop 2 needs .* --best-metric"):
        EvaluationConfig(early_stop=2).check()
