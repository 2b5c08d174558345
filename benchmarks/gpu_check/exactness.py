"""Accumulation, moving average, loss scale, and a resume that equals the run without a break."""

from pathlib import Path
from typing import Any

import torch

from gpu_check.part import Job
from gpu_check.runs import demo_data, losses, train
from neuclip.checkpoint import storage

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/data/model_configs/tiny-vit.json"
ACCUMULATION_LIMIT = 1e-3
"""Of the first losses in float32: micro-batches of a ViT differ by rounding alone."""


def run(job: Job) -> None:
    data = demo_data(job, characters=16 if job.toy else 64)
    flags = ["--train-data", str(data / "train"), "--model", str(MODEL), "--device", job.device]
    flags += ["--method", "neuclip_pool", "--train-num-samples", "32" if job.toy else "320"]
    flags += ["--epochs", "2", "--warmup", "4", "--lr", "1e-3", "--log-every-n-steps", "1"]
    flags += ["--workers", "0"]
    whole, split = ["--batch-size", "16"], ["--batch-size", "8", "--accum-freq", "2"]
    ema = [*split, "--model-ema-decay", "0.99"]
    in_one = train(job, "in_one", *flags, *whole, "--precision", "fp32")
    in_two = train(job, "in_two", *flags, *split, "--precision", "fp32")
    first = [max(abs(a - b) for a, b in zip(losses(in_one)[:3], losses(in_two)[:3], strict=True))]
    job.record(accumulation_changes_first_losses_by=first[0])
    if first[0] > ACCUMULATION_LIMIT:
        raise SystemExit(f"accumulation changes the first losses by {first[0]:.2g}")
    for precision in ["fp32"] if job.device == "cpu" else ["amp_bf16", "amp_fp16"]:
        check_resume(job, precision, [*flags, *ema, "--precision", precision])


def check_resume(job: Job, precision: str, flags: list[str]) -> None:
    """Trains two epochs at once, and the second again from the first one's checkpoint."""
    name = f"at_once_{precision}"
    at_once = train(job, name, *flags)
    first = at_once / "checkpoints" / "epoch_1.pt"
    resumed = train(job, f"resumed_{precision}", *flags, "--resume", str(first))
    one, other = (tensors(folder / "checkpoints" / "epoch_2.pt") for folder in (at_once, resumed))
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    row: dict[str, Any] = {"precision": precision, "tensors": len(one)}
    row["loss_scale"] = precision == "amp_fp16"
    row["has_average"] = any("ema" in name for name in one)
    job.record(**row, different=len(different), for_example=different[:3])
    if different:
        raise SystemExit(f"a resume in {precision} changes {len(different)} of {len(one)} tensors")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by their place in it."""
    found: dict[str, torch.Tensor] = {}
    open_parts: list[tuple[str, Any]] = [("", storage.load(path))]
    while open_parts:
        place, value = open_parts.pop()
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, dict):
            open_parts += [(f"{place}/{key}", each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            open_parts += [(f"{place}/{key}", each) for key, each in enumerate(value)]
    return found
