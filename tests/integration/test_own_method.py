"""A method of one's own: one file outside the package, no edit inside."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from integration.conftest import SMALLEST

HINGE = Path(__file__).parents[2] / "examples" / "own_method.py"
PROGRAM = """
import sys
from neuclip.cli.app import main
sys.exit(main(["methods"]) or main(["methods", "hinge"]) or main(sys.argv[1:]))
"""


def neuclip(*words, methods):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={**os.environ, "NEUCLIP_METHODS": str(methods)},
        capture_output=True,
        text=True,
    )


def test_a_method_from_a_file_trains_by_its_name(demo_dir, tmp_path):
    done = neuclip(
        "train", "--method", "hinge", "--margin", "0.3", "--smoke", "--device", "cpu",
        "--model", SMALLEST,
        "--train-data", str(demo_dir / "train"), "--logs", str(tmp_path), "--name", "run",
        methods=HINGE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    listed, shown = done.stdout.split("hinge: ")
    assert "hinge" in listed and "a margin between positives and negatives" in listed
    assert "--margin" in shown and "how far every negative stays below its positive" in shown
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["method"] == {"name": "hinge", "temperature": 0.07, "margin": 0.3}
    assert (tmp_path / "run" / "checkpoints" / "epoch_2.pt").exists()


def test_a_file_that_is_missing_is_named(tmp_path):
    done = neuclip("--version", methods=tmp_path / "missing.py")
    assert done.returncode == 2
    assert "missing.py' cannot be imported (no file" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
