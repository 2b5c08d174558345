import subprocess
import sys
from collections import Counter

import pytest

from neuclip.errors import UserError
from neuclip.evaluation.datacomp.suite import load_suite

SUITE = load_suite()
SCORES = {key: number / 38 for number, key in enumerate(SUITE.tasks)}


def test_the_38_tasks_and_their_metrics():
    assert Counter(task.metric for task in SUITE.tasks.values()) == {
        "acc1": 27,
        "mean_per_class_recall": 4,
        "mean_recall@1": 2,
        "F1-macro_all": 1,
        "acc_worst_region": 1,
        "acc_top5_wg": 1,
        "acc_wg": 1,
        "jaccard_score_10-12": 1,
    }
    assert len({task.name for task in SUITE.tasks.values()}) == 38
    assert len({task.folder for task in SUITE.tasks.values()}) == 38


def test_folders_and_sources_as_published():
    tasks = SUITE.tasks
    assert tasks["vtab/cifar100"].folder == "wds_vtab-cifar100_test"
    assert tasks["vtab/cifar100"].source == "djghosh/wds_vtab-cifar100_test"
    assert tasks["fairness/dollar_street"].source == "djghosh/wds_dollar_street_test"
    assert tasks["misc/winogavil"].source == "nlphuji/winogavil"
    assert tasks["wilds/fmow"].groups.ignored == (5,)


def test_members_of_the_averages():
    sizes = {group: len(members.tasks) for group, members in SUITE.members.items()}
    assert sizes == {
        "datacomp": 38,
        "imagenet": 1,
        "imagenet-shifts": 6,
        "imagenet-variants": 7,
        "vtab": 13,
        "retrieval": 2,
        "retrieval-datacomp": 3,
    }
    for members in SUITE.members.values():
        assert set(members.tasks) <= SUITE.tasks.keys()
        assert len(set(members.tasks)) == len(members.tasks)
    shifts, variants = SUITE.members["imagenet-shifts"], SUITE.members["imagenet-variants"]
    assert {*shifts.tasks, "imagenet1k"} == set(variants.tasks)


def test_an_average_is_the_plain_mean():
    assert SUITE.average("datacomp", SCORES).value == pytest.approx(sum(range(38)) / 38 / 38)
    shifts = SUITE.averages(SCORES)["imagenet-shifts"]
    assert shifts.value == pytest.approx(sum(range(1, 7)) / 6 / 38)
    assert (shifts.done, shifts.total, shifts.missing) == (6, 6, ())


def test_an_average_over_missing_tasks_is_refused():
    some = {key: SCORES[key] for key in ("imagenet1k", "mnist")}
    with pytest.raises(UserError, match=r"DataComp average: 2 of 38 tasks.*missing: .*--partial"):
        SUITE.average("datacomp", some)
    found = SUITE.average("datacomp", some, partial=True)
    assert (found.done, found.total) == (2, 38)
    assert found.value == pytest.approx(sum(some.values()) / 2)
    assert SUITE.averages(some)["datacomp"].value is None
    assert SUITE.averages(some)["imagenet"].value == SCORES["imagenet1k"]
    with pytest.raises(UserError, match="0 of 13"):
        SUITE.average("vtab", some, partial=True)  # a mean of nothing


def test_selecting():
    keys = [task.key for task in SUITE.select(["winogavil", "vtab/svhn"], ["imagenet"])]
    assert keys == ["imagenet1k", "vtab/svhn", "misc/winogavil"]
    assert len(SUITE.select()) == 38


def test_the_help_of_eval_imports_no_torch():
    code = (
        "import sys, neuclip.cli.app\n"
        "try: neuclip.cli.app.main(['eval', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'matplotlib', 'open_clip'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
