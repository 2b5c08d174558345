"""Zero-shot evaluation with a real encoder: images a second, and the share of waiting."""

import os

import torch
import zero_shot

from gpu_check.part import Job
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.model.clip import build_clip
from neuclip.model.encoder import Encoder


def run(job: Job) -> None:
    device = torch.device(job.device)
    samples = 24 if job.toy else 20_000
    sizes = {"different": 4, "classes": 6, "templates": 2} if job.toy else {"different": 100}
    zero_shot.make_set(job.folder / load_suite().tasks["imagenet1k"].folder, samples, **sizes)
    model, precision = ("glyph-tiny", "fp32") if job.toy else ("ViT-B-32", "amp_bf16")
    encoder = Encoder(build_clip(model, precision, device), device)
    workers = 0 if job.toy else max(1, (os.cpu_count() or 2) - 1)
    settings = EvaluationSettings(batch_size=8 if job.toy else 512, workers=workers)
    found = zero_shot.measure(encoder, job.folder, samples, settings)
    waiting = 1 - found["encoder_seconds"] / found["seconds"]
    job.record(model=model, samples=samples, workers=workers, waiting=round(waiting, 4), **found)
