"""The whole step by part (benchmarks/step.py), with model FLOP utilisation.

Utilisation is the counted operations of a step over its time, against the rate of a large matrix
product measured on the same card in the same type.
"""

import statistics
import traceback

import step
import torch

from gpu_check.part import Job
from gpu_check.repeats import matmul_ceiling
from neuclip.errors import UserError

METHODS = ("openclip", "neuclip", "neuclip_pool", "fastclip_v3")
SHAPES = [
    # batch, further flags; the prediction in docs/scaling.md is for batch 512
    (512, ()),
    (256, ()),
    (1024, ()),
    (512, ("--compile-loss", "compile")),
    (512, ("--compile-loss", "graphs")),
    (512, ("--compile",)),
]
TOY = [(8, ())]


def run(job: Job) -> None:
    dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
    ceiling = matmul_ceiling(job.device, dtype, 256 if job.toy else 8192)
    failed: list[str] = []
    job.record(matmul_tflops=round(ceiling / 1e12, 3), dtype=str(dtype))
    for batch, more in TOY if job.toy else SHAPES:
        words = ["--batch-size", str(batch), "--device", job.device, "--no-profile", *more]
        words += ["--model", "glyph-tiny" if job.toy else "ViT-B-32"]
        words += ["--num-prototypes", "32" if job.toy else "4096"]
        words += ["--repeats", "2" if job.toy else "5", "--warmup", "1" if job.toy else "4"]
        words += ["--precision", "fp32" if job.device == "cpu" else "amp_bf16"]
        words += ["--methods", *METHODS]
        try:
            found = step.measure(step.arguments(words))
        except UserError as error:
            job.record(batch=batch, options=more, left_out=str(error))
            continue
        except Exception as error:  # a compiler's error must not cost the other shapes
            traceback.print_exc()
            failed.append(f"{batch} {' '.join(more)}: {type(error).__name__}")
            job.record(batch=batch, options=more, failed=failed[-1])
            continue
        for method, row in found["methods"].items():
            job.record(batch=batch, options=more, method=method, **figures(row, ceiling))
    if failed:
        raise SystemExit(f"failed: {failed}")


def figures(row: dict, ceiling: float) -> dict:
    """A method's row with milliseconds, the spread of its rounds, and utilisation."""
    seconds = row["seconds"]
    ratios = row["ratios"]
    middle = statistics.median(ratios)
    return {
        "milliseconds": {part: round(1e3 * value, 3) for part, value in seconds.items()},
        "ratio_to_openclip": row["ratio_to_openclip"],
        "ratio_spread": round((max(ratios) - min(ratios)) / middle, 3),
        "normalizer_share": row["normalizer_share"],
        "allocated_mib": row.get("allocated_mib"),
        "tflop": round(row["flops"] / 1e12, 4),
        "utilisation": round(row["flops"] / seconds["total"] / ceiling, 4),
    }
