"""Measures the cost of zero-shot evaluation beside the encoder: reading, class vectors, metrics.

    python benchmarks/zero_shot.py --samples 50000 --rate 200 --workers 2

The encoder is a stand-in that waits for a given time per image, as a process waits for its GPU. A
text takes a tenth of an image's time. (ViT-B/32's text encoder has two thirds of its image
encoder's operations; a tenth hides less of the other costs.) The set has 1000 classes, 80 templates
and JPEGs of 224 pixels in DataComp's layout.

Prints the total time divided by the encoder's time; the rest of the time before the encoder's first
call, between calls and after its last call; and CPU time, which hardly depends on other programs.
CPU time is given for the main thread outside the encoder, which adds to the encoder's time; for
tokenization in a second thread, which overlaps; and for the readers per image. The readers' time
multiplied by the rate is the number of cores that they need. Writes `zero_shot.json` into
benchmarks/results/.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from photographs import photograph
from torch.nn.functional import normalize

from neuclip.data.shard_writer import write_shards
from neuclip.evaluation.datacomp.sets import open_task
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings, ImageTextEncoder
from neuclip.model.clip import build_clip

RESULTS = Path(__file__).parent / "results"
CLASSES, TEMPLATES, DIM = 1000, 80, 512
AUTOGROUP = Path("/proc/self/autogroup")  # exists where the kernel schedules by session


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--rate", type=float, default=500, help="images per second of the encoder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


class Waiting:
    """An encoder that waits; a text takes a tenth of an image's time."""

    def __init__(self, rate: float) -> None:
        clip = build_clip("ViT-B-32", "fp32", torch.device("meta"))
        self.transform, self.tokenize = clip.eval_transform, clip.tokenize
        self.device = torch.device("cpu")
        self.rate = rate

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self._wait(len(images), len(images) / self.rate)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._wait(len(tokens), len(tokens) / self.rate / 10)

    def _wait(self, rows: int, seconds: float) -> torch.Tensor:
        start = time.perf_counter()
        features = normalize(torch.randn(rows, DIM), dim=-1)
        time.sleep(max(0.0, start + seconds - time.perf_counter()))
        return features


class Timed:
    """An encoder with its time; a GPU is waited for at the end of every call."""

    def __init__(self, encoder: ImageTextEncoder) -> None:
        self._encoder = encoder
        self.transform, self.tokenize = encoder.transform, encoder.tokenize
        self.device = encoder.device
        self.first = self.last = self.seconds = self.cpu = 0.0
        self.images, self.image_seconds = 0, 0.0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        before = self.seconds
        features = self._timed(self._encoder.encode_image, images)
        self.images += len(images)
        self.image_seconds += self.seconds - before
        return features

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._timed(self._encoder.encode_text, tokens)

    def _timed(self, encode: Callable, inputs: torch.Tensor) -> torch.Tensor:
        start, cpu = time.perf_counter(), time.thread_time()
        features = encode(inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.first, self.last = self.first or start, time.perf_counter()
        self.seconds += self.last - start
        self.cpu += time.thread_time() - cpu
        return features


def make_set(
    folder: Path,
    samples: int,
    *,
    different: int = 200,
    classes: int = CLASSES,
    templates: int = TEMPLATES,
) -> None:
    import numpy as np

    chance = np.random.default_rng(0)
    images = [photograph(224, chance) for _ in range(min(samples, different))]
    folder.mkdir(parents=True)
    rows = (
        (f"s{n:07}", {"jpg": images[n % len(images)], "cls": str(n % classes).encode()})
        for n in range(samples)
    )
    sizes = write_shards(folder / "test", rows, 5000)
    for number, name in enumerate(sorted(sizes)):
        (folder / "test" / name).rename(folder / "test" / f"{number}.tar")
    (folder / "test" / "nshards.txt").write_text(str(len(sizes)))
    names = "\n".join(f"class number {n}" for n in range(classes))
    (folder / "classnames.txt").write_text(names + "\n")
    lines = "\n".join(f"image {n} of a {{c}}." for n in range(templates))
    (folder / "zeroshot_classification_templates.txt").write_text(lines + "\n")


def measure(
    encoder: ImageTextEncoder, folder: Path, samples: int, settings: EvaluationSettings
) -> dict[str, float]:
    """Evaluates the set that `make_set` wrote into a folder; where the time went."""
    task = dataclasses.replace(load_suite().tasks["imagenet1k"], size=samples)
    timed = Timed(encoder)
    start, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    evaluate(EvaluatedModel(timed), open_task(folder, task), settings)
    end = time.perf_counter()
    thread, cpu = time.thread_time() - thread, time.process_time() - cpu
    total = end - start
    return {
        "seconds": round(total, 2),
        "encoder_seconds": round(timed.seconds, 2),
        "over_encoder": round(total / timed.seconds, 4),
        "encoder_images_per_second": round(timed.images / timed.image_seconds, 1),
        "seconds_before_encoder": round(timed.first - start, 2),
        "seconds_between_calls": round(timed.last - timed.first - timed.seconds, 2),
        "seconds_after_encoder": round(end - timed.last, 2),
        "main_thread_cpu_seconds": round(thread - timed.cpu, 2),
        "token_thread_cpu_seconds": round(cpu - thread, 2),
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder) / load_suite().tasks["imagenet1k"].folder, args.samples)
        settings = EvaluationSettings(batch_size=args.batch_size, workers=args.workers)
        times = measure(Waiting(args.rate), Path(folder), args.samples, settings)
    reading = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average_15_minutes": round(os.getloadavg()[2], 1),
        "priority": AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else os.nice(0),
        **{key: vars(args)[key] for key in ("samples", "rate", "workers", "batch_size")},
        **times,
        "reading_cpu_ms_per_picture": round(
            (reading.ru_utime + reading.ru_stime) / args.samples * 1000, 2
        ),
    }
    print(json.dumps(found, indent=1))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "zero_shot.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
