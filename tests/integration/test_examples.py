"""The examples run as a user would run them."""

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(capsys):
    """Runs an example as a script, in this process, which has imported torch already."""

    def output_of(name):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return output_of


def test_plain_pytorch_learns(run):
    accuracies = [int(number) for number in re.findall(r"accuracy (\d+)%", run("plain_pytorch.py"))]
    assert len(accuracies) == 5
    assert accuracies[-1] >= 90


def mean_losses(output):
    return [float(number) for number in re.findall(r"mean loss (-?[\d.]+)", output)]


def test_open_clip_step_learns(run):
    losses = mean_losses(run("open_clip_step.py"))
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.03


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_clip_learns(run):
    losses = mean_losses(run("transformers_clip.py"))
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.03
