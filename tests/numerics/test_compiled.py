"""The compiled loss equals the eager one; the compiler's own backend is for `make gpu-check`."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_compiled_loss_equals_the_eager_one():
    script = Path(__file__).with_name("compiled_loss.py")
    done = subprocess.run(
        [sys.executable, script, "aot_eager"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["graphs"] >= 4  # passes over blocks, and the inner step
    assert found["kept"] == []
    assert len(found["differences"]) == 4
    for name, difference in found["differences"].items():
        assert difference < 1e-5, name
