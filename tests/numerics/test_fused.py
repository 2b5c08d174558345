"""The fused kernels against the blocks, through Triton's interpreter; on CUDA see tests/gpu."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_fused_kernels_equal_the_blocks():
    # The interpreter must be chosen before Triton is imported, hence the process.
    script = Path(__file__).with_name("fused_interpreter.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 18
    for name, error in errors.items():
        # In float16 the softmaxes are rounded before they meet the candidates.
        limit = 2e-3 if "float16" in name and "pulls" in name else 1e-5
        assert error < limit, (name, error)
