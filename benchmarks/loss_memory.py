"""Compares peak memory and time of a loss's forward and backward pass with open_clip's ClipLoss.

    python benchmarks/loss_memory.py --batch-size 16384
    python benchmarks/loss_memory.py --batch-size 32768 --memory-only --without-clip-loss

Memory: each loss runs in its own process, which reports the rise of its resident memory (CUDA: the
allocator's peak). Time: all losses take turns in one process, and the result is the median over
rounds of the ratio to ClipLoss (CPU seconds, which depend less on other programs; wall time on
CUDA). `neuclip` is also timed without its prototype steps (`inner_steps: 0`), which have no
counterpart in ClipLoss. Features are random, in float32. Writes `loss_memory_bBATCH.json` into
benchmarks/results/.
"""

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from open_clip.loss import ClipLoss

import neuclip
from neuclip.catalogue.registry import METHODS

RESULTS = Path(__file__).parent / "results"
WITHOUT_STEPS = "neuclip-without-steps"
NAMES = [*(name for name in METHODS if name != "siglip"), WITHOUT_STEPS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Contender:
    """A loss with its state, at temperature 0.05."""

    def __init__(self, name: str, batch: int, dim: int):
        self.reference = name == "ClipLoss"
        if self.reference:
            self.loss = ClipLoss()
            return
        method, settings = name, {}
        if name == WITHOUT_STEPS:
            method, settings = "neuclip", {"inner_steps": 0}
        if "gamma_decay_epochs" in METHODS[method].settings.model_fields:
            settings |= {"gamma": 0.5, "gamma_decay_epochs": 10.0}
        self.loss = neuclip.create_loss(
            method, embed_dim=dim, steps_per_epoch=1, num_samples=batch, **settings
        ).to(DEVICE)

    def step(self, features: torch.Tensor) -> float:
        """Runs a forward and backward pass and returns its seconds."""
        scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
        image, text = (side.detach().requires_grad_() for side in features)
        more = {} if self.reference else {"sample_ids": torch.arange(len(image))}
        clock = time.perf_counter if DEVICE == "cuda" else time.process_time
        begin = clock()
        self.loss(image, text, scale, **more).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return clock() - begin


def unit(batch: int, dim: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(2, batch, dim, device=DEVICE), dim=-1)


def memory(name: str, batch: int, dim: int) -> float:
    """Peak memory of a pass in MB, without the features and the loss's state between steps."""
    contender, features = Contender(name, batch, dim), unit(batch, dim)
    # Two steps of a small batch: memory of the libraries and of the first step is not counted.
    for _ in range(2):
        contender.step(unit(16, dim))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(features)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contender.step(features)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def times(names: list[str], batch: int, dim: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by loss; the losses take turns."""
    contenders, features = {name: Contender(name, batch, dim) for name in names}, unit(batch, dim)
    for contender in contenders.values():
        for _ in range(2):
            contender.step(unit(16, dim))
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender.step(features))
            print(name, round(found[name][-1], 3), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument(
        "--without-clip-loss", action="store_true", help="ClipLoss needs 16 B^2 bytes"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, dim = args.batch_size, args.embed_dim
    if args.one:
        print(memory(args.one, batch, dim))
        return
    names = [*([] if args.without_clip_loss else ["ClipLoss"]), *args.methods]
    found = {}
    for name in names:
        words = [sys.executable, __file__, "--one", name]
        words += ["--batch-size", str(batch), "--embed-dim", str(dim)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found[name] = {"peak_mb": round(float(output.splitlines()[-1]), 1)}
        print(name, found[name], flush=True)
    if not args.memory_only:
        for name, seconds in times(names, batch, dim, args.rounds).items():
            found[name]["seconds"] = [round(each, 3) for each in seconds]
    for row in found.values():
        if args.without_clip_loss:
            # ClipLoss needs four float32 matrices, as measured at batch sizes where they fit.
            row["memory_over_16_b2_bytes"] = round(row["peak_mb"] / (16 * batch**2 / 2**20), 4)
            continue
        base = found["ClipLoss"]
        row["memory_over_clip_loss"] = round(row["peak_mb"] / base["peak_mb"], 4)
        if "seconds" in row:
            ratios = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
            row["time_over_clip_loss"] = round(statistics.median(ratios), 3)
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/loss_memory.py {' '.join(sys.argv[1:])}",
        "machine": f"{card}, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "losses": found,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"loss_memory_b{batch}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
