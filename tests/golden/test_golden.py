"""The first 20 losses of every recipe, kept as text: nothing changes silently.

After a change that is meant to move them: `NEUCLIP_WRITE_GOLDEN=1 make test`, and say in the commit
why they moved.
"""

import os
import shutil
from pathlib import Path

import pytest

from neuclip.cli import main
from neuclip.flags import recipe_names
from neuclip.training.tracking import read_records

CURVES = Path(__file__).parent
RECIPES = [name for name in recipe_names() if name != "demo"]  # `demo` is only built upon

# Loose enough for another processor's kernels; a changed formula is far outside.
TOLERANCE = 2e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_as_it_did(recipe, demo_dir, tmp_path):
    flags = ["--recipe", recipe, "--smoke", "--train-data", str(demo_dir / "train")]
    flags += ["--logs", str(tmp_path), "--name", "run", "--device", "cpu", "--seed", "1"]
    flags += ["--log-every-n-steps", "1", "--save-frequency", "0"]
    assert main(["train", *flags]) == 0
    losses = [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    shutil.rmtree(tmp_path / "run")
    assert len(losses) == 20
    path = CURVES / f"{recipe}.txt"
    if os.environ.get("NEUCLIP_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    golden = [float(line) for line in path.read_text().splitlines()]
    assert losses == pytest.approx(golden, rel=TOLERANCE, abs=TOLERANCE)


def test_no_curve_is_left_over():
    assert {path.stem for path in CURVES.glob("*.txt")} == set(RECIPES)
