"""Fused kernels and row blocks against open_clip's losses (benchmarks/fused_kernel.py)."""

import fused_kernel
import torch

from gpu_check.part import Job
from neuclip.method.softmax.log_inner import obstacle_to_fused

BATCHES, DIM, REPEATS = (4096, 8192, 16384, 32768, 65536), 512, 5
EXACT_UP_TO = 8192
"""The largest batch whose values are compared with float64."""
LIMITS = {"value_error": 1e-4, "gradient_error": 1e-3}
LOW_LIMITS = {"value_error": 1e-2, "gradient_error": 2e-2}
"""For bfloat16 products."""
THEIRS = ("ClipLoss", "SigLipLoss")
"""open_clip's: their errors are recorded to compare, and fail nothing."""


def run(job: Job) -> None:
    device = torch.device(job.device)
    if obstacle := obstacle_to_fused(device):
        job.record(left_out="fused kernels", why=obstacle)
    batches, dim, repeats = ((48,), 32, 2) if job.toy else (BATCHES, DIM, REPEATS)
    wrong = []
    for batch in batches:
        setting = fused_kernel.Setting(batch, dim, device)
        if batch <= EXACT_UP_TO:
            for name, errors in fused_kernel.errors(setting).items():
                job.record(batch=batch, loss=name, **errors)
                limits = LOW_LIMITS if "bfloat16" in name else LIMITS
                if not name.startswith(THEIRS):
                    wrong += [(name, key) for key in limits if not errors[key] < limits[key]]
        for name, row in fused_kernel.measure(setting, repeats).items():
            job.record(batch=batch, loss=name, **row)
    if wrong:
        raise SystemExit(f"differ from float64: {wrong}")
