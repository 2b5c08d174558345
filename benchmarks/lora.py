"""Compares LoRA and distillation with full fine-tuning: CPU time of a step, memory, checkpoint.

    python benchmarks/lora.py --model ViT-B-32 --batch-size 16 --rank 8

Each way runs in a process of its own, the ways in turn, `--rounds` times: peak resident memory of
the process, and the least CPU time of a step after the first (CPU time hardly depends on other
programs). The method is openclip, the optimiser AdamW. Checkpoints are the weights and the state of
the optimiser. Prints and writes ratios to full fine-tuning into benchmarks/results/.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from recorded import RESULTS, save

from neuclip import create_loss
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.model.clip import build_clip
from neuclip.model.lora import add_updates, count_trained, stored_weights
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from neuclip.training.teacher import Teacher, frozen_copy

CPU = torch.device("cpu")
WAYS = ("full", "lora", "full with teacher", "lora with teacher")
STEPS = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One way: CPU seconds of a step, peak memory, size of a checkpoint, trained parameters."""
    torch.manual_seed(0)
    clip = build_clip(args.model, "fp32", CPU)
    teacher = Teacher(frozen_copy(clip), 1.0, "") if "teacher" in args.way else None
    adaptation = {"lora_rank": args.rank} if "lora" in args.way else {}
    config = resolve(RunConfig.model_validate({"adaptation": adaptation}), 1)
    if adaptation:
        add_updates(clip.towers, config.adaptation, 0)
    optimizer = Optimizer(clip.towers, config.optim, 100)
    optimizer.set_rates(1)
    loss = create_loss("openclip", embed_dim=clip.embed_dim)
    step = TrainingStep(clip, clip.towers, loss, optimizer, CPU, teacher=teacher)
    size = args.batch_size
    batch = Batch(
        images=torch.randn(size, 3, clip.image_size, clip.image_size),
        tokens=clip.tokenize([f"picture {number}" for number in range(size)]),
        sample_ids=torch.arange(size),
        class_indices=torch.zeros(size, dtype=torch.int64),
        captions=[""] * size,
        keys=[""] * size,
    )
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        step([batch])
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    file = io.BytesIO()
    torch.save([stored_weights(clip.towers), optimizer.state_dict()], file)
    return {
        "cpu_seconds": min(seconds[1:]),
        "peak_mb": peak,
        "checkpoint_mb": len(file.getvalue()) / 2**20,
        "trained": count_trained(clip.towers).parameters,
    }


def main() -> None:
    args = arguments()
    if args.way:
        print(json.dumps(measure(args)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for way in WAYS:
            line = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            found = json.loads(subprocess.check_output(line, text=True).splitlines()[-1])
            known = best.setdefault(way, found)
            best[way] = {key: min(value, known[key]) for key, value in found.items()}
    full = best["full"]
    ratios = {
        way: {key: round(value / full[key], 3) for key, value in found.items()}
        for way, found in best.items()
    }
    for way, found in ratios.items():
        print(f"{way:18}", "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    path = RESULTS / f"lora_{Path(args.model).stem}_b{args.batch_size}_r{args.rank}.json"
    rounded = {way: {k: round(v, 2) for k, v in found.items()} for way, found in best.items()}
    save(path, 1, CPU, {"measured": rounded, "ratio_to_full": ratios})


if __name__ == "__main__":
    main()
