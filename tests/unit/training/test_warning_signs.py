"""Warning signs are functions of the records: once per run and subject, resumed or not."""

import math

import pytest
import torch

from neuclip.catalogue.registry import method_info
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.training.sameness import equal_captions, mean_cosines
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


# --- the run itself


def steps(count=4, first=200, **values):
    """Training records after the warm-up, as a run of 8 pairs a step has them."""
    common = {"loss": 1.0, "temperature": 0.05, "image_cosine": 0.5, "text_cosine": 0.6}
    start = {"kind": "train", "step": 1, **common, "equal_captions": 0.0}
    return [start] + [{**start, "step": first + 50 * number, **values} for number in range(count)]


def config(method="openclip", *, temperature_min=None, **data):
    given = {} if temperature_min is None else {"temperature_min": temperature_min}
    tree = {"method": {"name": method, **given}, "optim": {"warmup": 120}}
    return validate({**tree, "data": {"global_batch_size": 8, **data}}, "here")


def found(records, **settings):
    return [(step, s.name) for step, s in signs_of(records, WarningSigns(config(**settings)))]


CHANCE = math.log(8)


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ({"loss": CHANCE - 0.01}, "nothing_learned"),
        ({"temperature": 0.01}, "temperature_at_bound"),
        ({"temperature": 1.0}, "temperature_at_bound"),
        ({"image_cosine": 0.99}, "collapsed"),
        ({"text_cosine": 0.999}, "collapsed"),
    ],
)
def test_signs_of_the_run_itself_need_three_records_after_the_warm_up(values, sign):
    assert found(steps(**values)) == [(300, sign)]
    assert found(steps(count=2, **values)) == []
    assert found(steps(first=20, count=4, **values)) == []  # 20, 70, 120, 170: one is after it
    healthy = steps(**values)
    healthy[2] = steps()[1] | {"step": 250}
    assert found(healthy) == []


def test_a_method_may_have_other_bounds_of_the_temperature():
    assert found(steps(temperature=0.01), method="moco") == []
    assert found(steps(temperature=0.5), method="moco") == [(300, "temperature_at_bound")]


@pytest.mark.parametrize(
    ("method", "temperature", "remedy"),
    [
        ("neuclip_pool", 0.01, "--temperature-min 0.03, a lower --lr-tau or a lower --rho holds"),
        ("neuclip_pool", 1.0, "a lower --lr-tau or a higher --rho holds"),
        ("openclip", 0.01, "--temperature-min 0.03 or a lower --lr-tau holds"),
        ("openclip", 1.0, ": a lower --lr-tau holds"),
        ("siglip", 0.01, ": a lower --lr-tau holds"),
    ],
)
def test_remedies_against_a_bound_are_settings_of_the_method(method, temperature, remedy):
    records = steps(temperature=temperature)
    ((_, sign),) = signs_of(records, WarningSigns(config(method=method)))
    assert remedy in sign.text
    for flag in ("--rho", "--temperature-min"):
        setting = flag[2:].replace("-", "_")
        assert flag not in sign.text or setting in method_info(method).settings.model_fields


def test_a_bound_that_the_user_chose_is_no_sign():
    watch = WarningSigns(config(method="neuclip_pool", temperature_min=0.03))
    assert signs_of(steps(temperature=0.03), watch) == []


@pytest.mark.parametrize("method", ["infonce_queue", "moco", "openclip"])
def test_the_warm_up_of_a_queue_is_a_remedy_where_there_is_one(method):
    ((_, sign),) = signs_of(steps(image_cosine=0.99), WarningSigns(config(method=method)))
    assert sign.name == "collapsed"
    assert ("--queue-warm-up" in sign.text) == (method == "infonce_queue")


def test_other_methods_are_stuck_where_g_is_one():
    assert found(steps(batch_log_inner=0.2), method="neuclip_pool") == [(300, "nothing_learned")]
    assert found(steps(loss=CHANCE, batch_log_inner=-3.0), method="neuclip_pool") == []
    assert found(steps(loss=CHANCE), method="siglip") == []


def test_a_temperature_that_starts_at_its_bound_is_that_of_the_weights():
    records = [{**record, "temperature": 0.01} for record in steps()]
    assert found(records) == []


def test_captions_that_repeat_are_said_at_once_unless_they_are_masked():
    records = steps(first=50, count=3, equal_captions=0.6)
    assert found(records) == [(100, "captions_alike")]
    assert found(records, false_negatives="mask") == []
    every = signs_of(steps(equal_captions=1.0), WarningSigns(config()))
    assert every[0][1].text.startswith("every pair of a batch had a caption")
    assert found(steps(equal_captions=0.3)) == []


def test_records_that_are_not_finite_show_nothing():
    nothing = dict.fromkeys(("loss", "temperature", "image_cosine", "equal_captions"))
    assert found(steps(**nothing)) == []


def test_what_the_records_hold_is_what_a_double_loop_gives():
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    both = torch.nn.functional.normalize(both + 0.5, dim=-1)
    expected = [
        sum(float(side[i] @ side[j]) for i in range(9) for j in range(9) if i != j) / 72
        for side in both
    ]
    values = mean_cosines(both.mean(1), 9)
    assert [values["image_cosine"], values["text_cosine"]] == pytest.approx(expected)
    assert equal_captions(["a", "b", "", "a", "c", ""]) == 0.5
    assert equal_captions(["", ""]) == 0.0
