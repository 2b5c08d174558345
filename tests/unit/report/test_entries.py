import json

import pytest

from neuclip.errors import UserError
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.report.entries import benchmark_results, choose_baseline, entries
from neuclip.report.runs import load_runs


def labels(folders):
    return [(entry.label, len(entry.runs)) for entry in entries(load_runs(folders))]


def test_runs_that_differ_in_the_seed_are_one_entry(runs):
    same = {"data": {"workers": 2, "train_data": "/here/shards"}}
    folders = [
        runs.make("a", seed=1, **same),
        runs.make("b", "openclip"),
        runs.make("c", seed=2, data={"workers": 0, "train_data": "/here/shards"}),
        runs.make("d", seed=3, output={"logs": "/elsewhere"}, **same),
    ]
    assert labels(folders) == [("neuclip", 3), ("openclip", 1)]


def test_equal_seeds_are_repeats(runs):
    folders = [runs.make(name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    (entry,) = entries(load_runs(folders))
    assert [run.label for run in entry.runs] == ["a", "c"]
    assert [run.label for run in entry.repeats] == ["b"]
    assert "it repeats a (same settings, same data, seed 1)" in entry.repeats[0].gaps[-1]


def test_other_settings_or_data_are_another_entry(runs):
    folders = [
        runs.make("a", optim={"lr": 1e-3}),
        runs.make("b", optim={"lr": 2e-3}),
        runs.make("c", "openclip"),
    ]
    assert labels(folders) == [
        ("neuclip (lr 0.001)", 1),
        ("neuclip (lr 0.002)", 1),
        ("openclip", 1),
    ]
    folders = [runs.make(n, data={"train_data": f"/x/{n}"}) for n in ("cc3m", "cc12m")]
    assert labels(folders) == [("neuclip (data cc3m)", 1), ("neuclip (data cc12m)", 1)]


def test_data_are_what_was_read_not_what_they_are_called(runs):
    def make(name, path, digest, seed):
        run = runs.make(name, data={"train_data": path}, seed=seed)
        report = {"total": 0, "by_kind": {}, "examples": []}
        read = {"samples": 10, "digest": digest}
        (run / "data_report.json").write_text(json.dumps({"data": read, **report}))
        return run

    copies = [make("a", "/here/cc3m", "abcdef01", 1), make("b", "/there/copy", "abcdef01", 2)]
    assert labels(copies) == [("neuclip", 2)]
    other = make("c", "/there/coco/cc3m", "012345ff", 1)
    assert labels([*copies, other]) == [
        ("neuclip (data here/cc3m)", 2),
        ("neuclip (data coco/cc3m)", 1),
    ]
    changed = make("d", "/here/cc3m", "99999999", 1)  # other files at the same place
    assert labels([copies[0], changed]) == [
        ("neuclip (data cc3m, abcdef)", 1),
        ("neuclip (data cc3m, 999999)", 1),
    ]


def test_without_recorded_data_the_path_stands_for_them(runs):
    folders = [runs.make(n, data={"train_data": f"/{n}/train"}, seed=s) for s, n in enumerate("ab")]
    assert labels(folders) == [("neuclip (data a/train)", 1), ("neuclip (data b/train)", 1)]


def test_the_name_of_the_run_where_many_settings_differ(runs):
    many = {"optim": {"lr": 1e-3, "wd": 0.3, "warmup": 7}}
    assert labels([runs.make("a"), runs.make("b", **many)]) == [("a", 1), ("b", 1)]


def test_the_baseline(runs):
    found = entries(
        load_runs([runs.make("a"), runs.make("b", "openclip"), runs.make("c", "siglip")])
    )
    assert choose_baseline(found, None).label == "openclip"
    assert choose_baseline(found[::2], None).label == "neuclip"
    assert choose_baseline(found, "c").label == choose_baseline(found, "siglip").label == "siglip"
    with pytest.raises(UserError, match=r"'siglop' is not among the compared runs.*siglip"):
        choose_baseline(found, "siglop")


class TestBenchmarkResults:
    def test_checkpoints_by_epoch(self, runs):
        run = runs.make("a")
        score = runs.evaluate(run, 0.5, epoch=10, tasks=["imagenet1k"])
        runs.evaluate(run, 0.3, epoch=9, tasks=["imagenet1k"])
        runs.evaluate_split(run, 0.4)
        (read,) = load_runs([run])
        early, late = benchmark_results(read)
        assert (early.epoch, late.epoch) == (9, 10)
        assert late.scores["imagenet1k"].value == pytest.approx(score)
        assert len(late.scores["imagenet1k"].outcomes) == 400
        assert early.scores["imagenet1k"].outcomes is None  # read of the latest only

    def test_results_of_another_suite_are_a_gap(self, runs):
        run = runs.make("a")
        runs.evaluate(run, 0.5, tasks=["imagenet1k"], suite="datacomp-38/0")
        (read,) = load_runs([run])
        assert benchmark_results(read) == []
        assert f"not of suite {load_suite().version}" in read.gaps[-1]

    def test_results_of_several_checkpoints_are_a_gap(self, runs):
        run = runs.make("a")
        runs.evaluate(run, 0.5, tasks=["imagenet1k"])
        runs.evaluate(run, 0.5, tasks=["cars"], checkpoint="other")
        (read,) = load_runs([run])
        assert benchmark_results(read) == []
        assert "of several checkpoints" in read.gaps[-1]

    def test_outcomes_of_another_judging_are_not_taken(self, runs):
        run = runs.make("a")
        runs.evaluate(run, 0.9, tasks=["cars"])
        runs.evaluate(run, 0.5, tasks=["cars"], outcomes=False)
        (read,) = load_runs([run])
        assert benchmark_results(read)[0].scores["cars"].outcomes is None
