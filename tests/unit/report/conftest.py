import json

import numpy as np
import pytest

from neuclip.config.validation import validate
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.outcomes import Outcomes, write_outcomes
from neuclip.evaluation.results import EvalResult, Provenance, write_eval_result, write_result
from neuclip.run_folder import RunFolder, outcomes_path

SAMPLES = 400


def right(skill, seed):
    """Who is right on which of the samples: the samples are alike hard for everybody."""
    hard = np.random.default_rng(0).random(SAMPLES)
    return (hard + 0.05 * np.random.default_rng(seed).random(SAMPLES) < skill).astype(np.float32)


class Runs:
    """Makes run folders with results."""

    def __init__(self, folder):
        self.folder = folder

    def make(self, name, method="neuclip", **settings):
        run = self.folder / name
        run.mkdir(parents=True)
        tree = {"name": name, "method": {"name": method}, **settings}
        (run / "config.yaml").write_text(validate(tree, "test").to_yaml())
        record = {"kind": "train", "step": 80, "epoch": 8.0, "samples_seen": 8000, "loss": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return run

    def evaluate(self, run, skill, *, seed=0, tasks=None, epoch=8, outcomes=True, **made):
        """Results of the benchmark: all tasks alike, so that an average is each task's score."""
        suite, path = load_suite(), RunFolder(run).results(epoch)
        found = Outcomes("mean", right(skill, seed), np.zeros(SAMPLES, np.int32))
        whole = {"suite": suite.version, "checkpoint": f"{run.name}{epoch}", "data": "d"}
        provenance = Provenance(**{**whole, "precision": "fp32", **made})
        for key in suite.tasks if tasks is None else tasks:
            metrics = {"main_metric": found.evaluate(), suite.tasks[key].metric: found.evaluate()}
            write_result(path, EvalResult(key, suite.tasks[key].name, metrics, provenance))
            if outcomes:
                write_outcomes(outcomes_path(path, key), found)
        return found.evaluate()

    def evaluate_split(self, run, acc1, split="unseen_face_test"):
        metrics = {"acc1": acc1, "chance": 0.01, "main_metric": acc1, "mean_recall@1": acc1 / 2}
        write_eval_result(RunFolder(run).results(8), split, metrics)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Makes runs for all tests of a module, which do not change them."""
    return Runs(tmp_path_factory.mktemp("runs"))
