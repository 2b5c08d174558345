"""Compares speed and memory of the fused kernels, the row blocks and ClipLoss on CUDA.

    python benchmarks/fused_kernel.py --batch-sizes 4096 8192 16384 32768 65536

Needs CUDA and Triton. The three take turns at every batch size. Times are medians of CUDA events;
times and the allocator's peaks are given as ratios to ClipLoss. A batch size that exceeds the
device memory is recorded as such. Writes `fused_kernel_CARD_PRECISION.json` into
benchmarks/results/.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.loss import ClipLoss

from neuclip import create_loss
from neuclip.method.softmax import log_inner

RESULTS = Path(__file__).parent / "results"


def passes(loss: Callable[..., torch.Tensor], features: torch.Tensor, fused: bool) -> float:
    """Milliseconds of a forward and backward pass."""
    log_inner.HAS_TRITON = fused
    image, text = (side.detach().requires_grad_() for side in features)
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    loss(image, text, scale).backward()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(batch: int, dim: int, repeats: int) -> dict[str, dict[str, float | str]]:
    features = torch.nn.functional.normalize(torch.randn(2, batch, dim, device="cuda"), dim=-1)
    ours = create_loss("openclip", embed_dim=dim).cuda()
    contenders = {"ClipLoss": (ClipLoss(), False), "blocks": (ours, False), "fused": (ours, True)}
    found: dict[str, dict[str, float | str]] = {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 2):  # two warm-up rounds, in which Triton compiles
        fitting = [name for name in contenders if "failed" not in found.get(name, {})]
        for name in fitting:
            loss, fused = contenders[name]
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                taken = passes(loss, features, fused)
            except torch.cuda.OutOfMemoryError:
                found[name] = {"failed": "out of memory"}
                torch.cuda.empty_cache()
                continue
            if number >= 2:
                times[name].append(taken)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            found[name] = {"peak_mb": round(peak, 1)}
    for name, values in times.items():
        if values:
            found[name]["milliseconds"] = round(statistics.median(values), 3)
    base = found["ClipLoss"]
    for row in found.values():
        row |= {
            f"{key}_over_clip_loss": round(float(row[key]) / float(base[key]), 4)
            for key in ("peak_mb", "milliseconds")
            if key in row and key in base
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precision", choices=["highest", "high"], default="highest")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fused_kernel.py: no CUDA device; the fused kernels need one")
    if not log_inner.HAS_TRITON:
        sys.exit("fused_kernel.py: Triton is not installed")
    torch.set_float32_matmul_precision(args.precision)
    card = torch.cuda.get_device_name()
    found = {}
    for batch in args.batch_sizes:
        found[batch] = measure(batch, args.embed_dim, args.repeats)
        print(batch, found[batch], flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/fused_kernel.py {' '.join(sys.argv[1:])}".rstrip(),
        "machine": card,
        "torch": torch.__version__,
        "matmul_precision": args.precision,
        "batch_sizes": found,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"fused_kernel_{card.replace(' ', '-')}_{args.precision}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
