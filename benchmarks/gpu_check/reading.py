"""Reading JPEGs of 512 px: images a second by workers, against what a training step takes."""

import itertools
import os
import time

import photographs
import step

from gpu_check.part import Job
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.opening import open_source
from neuclip.model.clip import build_clip
from neuclip.model.device import choose_device


def run(job: Job) -> None:
    samples, side, different = (32, 64, 4) if job.toy else (6000, 512, 40)
    shards = job.folder / "shards"
    photographs.make_shards(shards, samples, side, different=different)
    model, batch = ("glyph-tiny", 4) if job.toy else ("ViT-B-32", 256)
    cores = os.cpu_count() or 2
    numbers = (
        [0] if job.toy else sorted({max(1, cores // 4), max(1, cores // 2), max(1, cores - 1)})
    )
    rates = {}
    for workers in numbers:
        rates[workers] = images_per_second(str(shards), model, batch, workers, 3 if job.toy else 12)
        job.record(workers=workers, images_per_second=round(rates[workers], 1))
    best = max(rates, key=rates.__getitem__)
    words = ["--model", model, "--batch-size", str(batch), "--methods", "openclip"]
    words += ["--train-data", str(shards), "--workers", str(best), "--no-profile"]
    words += ["--repeats", "2" if job.toy else "12", "--warmup", "1" if job.toy else "3"]
    words += ["--device", job.device, "--precision", "fp32" if job.toy else "amp_bf16"]
    seconds = step.measure(step.arguments(words))["methods"]["openclip"]["seconds"]
    job.record(
        workers=best,
        step_images_per_second=round(batch / (seconds["total"] - seconds["data"]), 1),
        waiting_for_data=round(seconds["data"] / seconds["total"], 4),
    )


def images_per_second(shards: str, model: str, batch: int, workers: int, batches: int) -> float:
    """Of the loader alone, after its first batch."""
    clip = build_clip(model, "fp32", choose_device("cpu"))
    settings = LoaderSettings(batch, workers=workers)
    loader = TrainLoader(open_source(shards), clip.train_transform, clip.tokenize, settings)
    reading = iter(loader)
    next(reading)
    start = time.perf_counter()
    read = sum(len(each) for each in itertools.islice(reading, batches))
    return read / (time.perf_counter() - start)
