"""The examples run as a user would run them."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_pytorch_learns():
    accuracies = [int(number) for number in re.findall(r"accuracy (\d+)%", run("plain_pytorch.py"))]
    assert len(accuracies) == 5
    assert accuracies[-1] >= 90
