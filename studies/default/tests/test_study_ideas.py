"""Variants of the pool, and small encoders."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

from studies.default import small
from studies.default.plan import Cell

from neuclip.catalogue.registry import METHODS


def test_small_encoders_learn_and_are_evaluated(first_glyphs_dir):
    data = small.Data(first_glyphs_dir)
    method = {"name": "neuclip_pool", "pool_size": 128}
    run = small.SmallRun(Cell("tune", "x", method, 1e-3, batch=16, measures=True), data)
    run.steps = 20
    run.cell = dataclasses.replace(run.cell, epochs=2)
    found = run.train()
    assert {row["split"] for row in found["evaluations"]} == set(small.SPLITS)
    assert all(math.isfinite(row["mse"]) for row in found["errors"])


def test_variants_train_and_leave_the_catalogue_of_this_process_alone():
    folder = Path(__file__).parent
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(folder / "train_variants.py")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 3
    assert not set(done.stdout.split()) & set(METHODS)
