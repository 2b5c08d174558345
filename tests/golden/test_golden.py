"""The first 20 losses of every recipe, kept as text: nothing changes silently.

The towers are small (tests/data/model_configs): the curves are those of the objectives. They are in
float64: 20 steps of Adam enlarge a rounding error some ten-thousandfold, which in float32 is as
much as a change of the formula, and every processor rounds differently.

After a change that is meant to move them: `NEUCLIP_WRITE_GOLDEN=1 make test`, and say in the commit
why they moved.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from neuclip.catalogue.registry import METHODS
from neuclip.cli.app import main
from neuclip.config.recipes import recipe_names
from neuclip.config.sections import ModelConfig
from neuclip.run_folder import read_records

CURVES = Path(__file__).parent
MODEL = CURVES.parent / "data" / "model_configs" / "tiny-vit.json"
# `demo` is only built upon, `finetune` has no settings of its own.
RECIPES = [name for name in recipe_names() if name not in {"demo", "finetune"}]

# Another processor's kernels stay within 1e-13; a table of float32 rounds to 1e-7.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def small_towers(monkeypatch):
    """Smaller towers than --smoke takes; the settings stay those of the recipe's model."""
    tiny = ModelConfig.tiny
    monkeypatch.setattr(
        ModelConfig, "tiny", lambda self: tiny(self).model_copy(update={"name": str(MODEL)})
    )


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
        path.write_text("".join(f"{loss:.9f}\n" for loss in losses))
    golden = [float(line) for line in path.read_text().splitlines()]
    assert losses == pytest.approx(golden, rel=TOLERANCE, abs=TOLERANCE)


def test_every_method_has_a_demo():
    assert {f"demo-{name}" for name in METHODS} <= set(RECIPES)


def test_no_curve_is_left_over():
    assert {path.stem for path in CURVES.glob("*.txt")} == set(RECIPES)
