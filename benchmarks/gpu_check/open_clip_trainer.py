"""open_clip's trainer and neuclip's on the same shards (benchmarks/against_open_clip.py)."""

import against_open_clip
import torch

from gpu_check.part import Job

SHAPE = ["--model", "ViT-B-32", "--characters", "256", "--image-side", "64", "--batch-size", "128"]
LENGTH = ["--epochs", "1", "--steps", "24", "--rounds", "2", "--warmup", "8", "--workers", "6"]
TOY = ["--characters", "64", "--batch-size", "8", "--epochs", "1", "--steps", "6", "--rounds", "2"]


def run(job: Job) -> None:
    precision = "fp32" if job.device == "cpu" else "amp_bf16"
    words = ["--device", job.device, "--precision", precision, "--environment", "here"]
    args = against_open_clip.arguments([*words, *(TOY if job.toy else [*SHAPE, *LENGTH])])
    against_open_clip.check_arguments(args)
    rounds = against_open_clip.measure(args, torch.device(job.device))
    for trainer, runs in rounds.items():
        rates = [round(each.samples_per_second, 1) for each in runs]
        job.record(
            trainer=trainer, samples_per_second=rates, last_losses=[r.losses[-1] for r in runs]
        )
    job.record(**against_open_clip.report(rounds)["neuclip_over_open_clip"])
