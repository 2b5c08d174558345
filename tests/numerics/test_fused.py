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
    assert len(errors) == 28
    for name, error in errors.items():
        # In float16 the softmaxes are rounded before they meet the candidates.
        limit = 2e-3 if "float16" in name and "pulls" in name else 1e-5
        assert error < limit, (name, error)


@pytest.mark.parametrize("name", ["_sums_kernel", "_gradients_kernel"])
def test_the_kernels_compile_for_cuda(name):
    """The interpreter accepts code that the compiler may refuse. Needs no device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from neuclip.method.softmax import fused

    kernel = getattr(fused, name)
    tiles = fused.TILES
    constants = {
        "WITH_MEANS": True,
        "KINDS": 3,
        "PRECISION": "tf32",
        "ANCHORS": tiles.anchors,
        "CANDIDATES": tiles.candidates,
        "INNER": tiles.inner,
        "PART": tiles.part,
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    numbers = {"n_rows", "n_columns", "dim", "offset"}
    kinds = {
        argument: "constexpr"
        if argument in constants
        else "i32"
        if argument in numbers or argument.endswith(("stride", "step"))
        else "*i64"
        if argument.endswith("groups")
        else "*fp32"
        for argument in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8})
    assert built.metadata.shared <= 163 * 2**10  # what a program may take on an A100
