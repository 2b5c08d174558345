import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

DEVELOPMENT = ("unseen_face_development", "unseen_character_development")
SMALLEST = str(Path(__file__).parents[1] / "data" / "model_configs" / "tiny-vit.json")


@dataclass(frozen=True)
class Demo:
    """A tiny data set, and command lines that train on it."""

    data: Path
    logs: Path

    def flags(self, name: str, *more: str, model: str = SMALLEST) -> list[str]:
        """Two epochs of the smallest model in a few seconds."""
        return [
            "--train-data", str(self.data / "train"),
            "--val-data", "::".join(str(self.data / split) for split in DEVELOPMENT),
            "--model", model, "--batch-size", "16", "--train-num-samples", "160",
            "--epochs", "2", "--lr", "1e-3", "--warmup", "5", "--workers", "1", "--device", "cpu",
            "--log-every-n-steps", "5", "--seed", "3",
            "--logs", str(self.logs), "--name", name, *more,
        ]  # fmt: skip

    def start(self, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`neuclip train` in a process group of its own, so that its workers can be killed too."""
        return subprocess.Popen(
            [sys.executable, "-m", "neuclip.training.main", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )


@pytest.fixture
def demo(demo_dir, tmp_path):
    return Demo(demo_dir, tmp_path / "logs")


def wait_for(condition, process, seconds=120):
    """Polls until a condition holds; fails when the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} first:\n{process.stdout.read()}")
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the condition never held")
        time.sleep(0.02)


def kill_group(process):
    """kill -9 for the process and its loader workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
