"""Measures the resident memory of the loader and its workers over many batches of tiny samples.

    python benchmarks/loader_memory.py --batches 50000

Worker processes read 4-pixel images with unique captions for many epochs, so that memory kept per
sample, batch or epoch becomes visible. The measure is each process's share of the pages that are
not files (Pss_Anon and Pss_Shmem), summed over the main process and the workers. It excludes
libraries, whose share depends on other programs. The result is the growth from a tenth of the
batches, when caches are full, to the end. Writes `loader_memory.json` into benchmarks/results/.
"""

import argparse
import datetime
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.shard_writer import write_shards
from neuclip.data.sources.shards import build_index, expand_patterns

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


def transform(image):
    return pil_to_tensor(image) / 255


def tokenize(texts):
    rows = torch.zeros(len(texts), 77, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([ord(letter) for letter in text])
    return rows


def pairs(samples: int):
    for number in range(samples):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (number % 256, number // 256 % 256, 7)).save(buffer, "png")
        yield f"{number:08d}", {"png": buffer.getvalue(), "txt": f"picture {number}".encode()}


def megabytes() -> float:
    """Memory of this process and its children; shared pages count once."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "shards", pairs(args.samples), 5000)
        index = build_index(expand_patterns(f"{folder}/shards"))
        settings = LoaderSettings(args.batch_size, workers=args.workers)
        loader = TrainLoader(index, transform, tokenize, settings)
        curve = watch(loader, args.batches)
    seconds = curve[-1][2]
    settled = [size for done, size, _ in curve if done >= args.batches / 10]
    growth = settled[-1] - settled[0]
    print(
        f"{args.batches:,} batches of {args.batch_size} in {seconds:.0f} s: "
        f"{settled[0]:.1f} MB after a tenth, {settled[-1]:.1f} MB at the end ({growth:+.1f} MB)"
    )
    if not args.no_save:
        result = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/loader_memory.py " + " ".join(sys.argv[1:]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "batches": args.batches,
            "seconds": round(seconds, 1),
            "megabytes": [[done, round(size, 2)] for done, size, _ in curve],
            "growth_megabytes": round(growth, 2),
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "loader_memory.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


def watch(loader: TrainLoader, batches: int) -> list[tuple[int, float, float]]:
    """Measures memory 50 times: (batches, megabytes, seconds since the start)."""
    curve: list[tuple[int, float, float]] = []
    done, start, every = 0, time.perf_counter(), max(1, batches // 50)
    while done < batches:
        for _ in loader:
            done += 1
            if done % every == 0:
                curve.append((done, megabytes(), time.perf_counter() - start))
                print(f"{done:7} batches  {curve[-1][1]:8.1f} MB", flush=True)
            if done == batches:
                break
    return curve


if __name__ == "__main__":
    main()
