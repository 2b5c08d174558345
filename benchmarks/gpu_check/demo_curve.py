"""The demo's recipe in float32 on the card and on the CPU: the same curve, and the same end.

Both follow the same order with the same weights. Rounding differs, and grows along a run: the first
losses must agree, and the ends differ as two seeds do, or less.
"""

from pathlib import Path

from gpu_check.part import Job
from gpu_check.runs import demo_data, losses, train
from neuclip.run_folder import read_records

FIRST = 5
"""Losses before rounding has grown."""
FIRST_LIMIT = 2e-3


def run(job: Job) -> None:
    data = demo_data(job, characters=16 if job.toy else 256)
    flags = ["--recipe", "demo-neuclip_pool", "--train-data", str(data / "train")]
    flags += ["--val-data", str(data / "unseen_face_development"), "--log-every-n-steps", "1"]
    flags += ["--save-frequency", "0", "--workers", "0" if job.toy else "4"]
    size = "--smoke" if job.toy else "--train-num-samples=4800"  # 2 epochs of 75 steps
    here = train(job, f"{job.device}_here", *flags, size, "--device", job.device)
    job.record(trained_on=job.device, last_loss=losses(here)[-1])
    reference = train(job, "reference", *flags, size, "--device", "cpu")
    ours, theirs = losses(here), losses(reference)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    job.record(
        steps=len(ours),
        first_losses_differ_by=max(apart[:FIRST]),
        losses_differ_by=max(apart),
        last_loss={job.device: ours[-1], "cpu": theirs[-1]},
        top1={job.device: top1(here), "cpu": top1(reference)},
    )
    if max(apart[:FIRST]) > FIRST_LIMIT:
        raise SystemExit(f"the first losses differ by {max(apart[:FIRST]):.2g}: {ours[:FIRST]}")


def top1(folder: Path) -> float:
    """Zero-shot accuracy on the unseen typeface at the end of a run."""
    records = [row for row in read_records(folder / "metrics.jsonl") if row["kind"] == "eval"]
    return float(records[-1]["metrics"]["acc1"])
