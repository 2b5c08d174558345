"""Peak memory and time of one forward and backward pass of a loss against open_clip's ClipLoss.

    python benchmarks/loss_memory.py --batch-size 8192 --methods openclip rgcl_batch

Each loss runs in a process of its own, which reports how far its resident memory rose (CUDA: the
allocator's peak). Features are random and held in float32. Writes a dated JSON file into
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

RESULTS = Path(__file__).parent / "results"


def measure(name: str, batch: int, dim: int, repeats: int) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(batch, dim, device=device), dim=-1
        ).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    loss = ClipLoss() if name == "ClipLoss" else neuclip.create_loss(name, embed_dim=dim)
    small = torch.nn.functional.normalize(torch.randn(8, dim, device=device), dim=-1)
    loss(small, small, scale).backward()  # the libraries' own memory is not the loss's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        loss(image, text, scale).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        image.grad = text.grad = scale.grad = None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device == "cuda":
        after = torch.cuda.max_memory_allocated() / 2**20
    return {"peak_mb": round(after - before, 1), "seconds": round(statistics.median(seconds), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["openclip", "rgcl_batch"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.batch_size, args.embed_dim, args.repeats)))
        return
    found = {}
    for name in ["ClipLoss", *args.methods]:
        words = [sys.executable, __file__, "--one", name, "--batch-size", str(args.batch_size)]
        words += ["--embed-dim", str(args.embed_dim), "--repeats", str(args.repeats)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
        print(name, found[name], flush=True)
    base = found["ClipLoss"]
    for row in found.values():
        row["memory_over_clip_loss"] = round(row["peak_mb"] / base["peak_mb"], 4)
        row["time_over_clip_loss"] = round(row["seconds"] / base["seconds"], 4)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/loss_memory.py --batch-size {args.batch_size} "
        f"--embed-dim {args.embed_dim} --methods {' '.join(args.methods)}",
        "machine": f"{card}, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "losses": found,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"loss_memory_b{args.batch_size}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
