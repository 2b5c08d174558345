"""Time of one training step by part, for several methods side by side in one process.

    python benchmarks/step.py --model ViT-B-32 --batch-size 64 --num-prototypes 4096 --repeats 5

The methods take turns, so that a noisy machine is noisy for all of them; the result is a ratio to
`openclip`. Images and captions are random: only the arithmetic is timed. Writes a JSON file with a
date into benchmarks/results/.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from neuclip.config import RunConfig
from neuclip.method.factory import Run, build_loss
from neuclip.methods import METHODS, method_settings
from neuclip.training.model import build_clip, choose_device, choose_precision
from neuclip.training.optim import Optimizer
from neuclip.training.timing import StepTimer

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-prototypes", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", default=["openclip", "rgcl_batch", "neuclip"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


class Contender:
    """One method with an optimiser of its own over the shared towers."""

    def __init__(self, name, clip, args, device):
        values = {"num_prototypes": args.num_prototypes} if name == "neuclip" else {}
        if "gamma" in METHODS[name].settings.model_fields:
            values |= {"gamma": 0.5}
        if "gamma_decay_epochs" in METHODS[name].settings.model_fields:
            values |= {"gamma_decay_epochs": 10.0}
        run = Run(clip.embed_dim, steps_per_epoch=1, num_samples=args.batch_size)
        self.loss = build_loss(method_settings(name, values), run).to(device)
        self.timer = StepTimer(device)
        self.loss.section = self.timer.section
        self.clip, self.device = clip, device

    def step(self, batch, optimizer):
        images, tokens, ids = batch
        self.timer.reset()
        with self.timer.section("encode"), self.clip.autocast(self.device):
            outputs = self.clip.towers(images, tokens)
        with self.timer.section("loss"):
            loss = self.loss(**outputs, sample_ids=ids)
        with self.timer.section("backward"):
            loss.backward()
        with self.timer.section("optimizer"):
            optimizer.gradient_norm()
            optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.timer.seconds()


def main() -> None:
    args = arguments()
    device = choose_device(args.device)
    torch.manual_seed(0)
    clip = build_clip(args.model, choose_precision(args.precision, device), device)
    optimizer = Optimizer(clip.towers, RunConfig().resolved().optim, 1000)
    optimizer.set_rates(0, 0.07)
    size = clip.towers.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    captions = [f"a photo of object number {i} on a table" for i in range(args.batch_size)]
    tokens = clip.tokenize(captions).to(device)
    ids = torch.arange(args.batch_size, device=device)
    contenders = {name: Contender(name, clip, args, device) for name in args.methods}
    parts = {name: [] for name in args.methods}
    for repeat in range(args.repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            seconds = contender.step((images.to(clip.input_dtype), tokens, ids), optimizer)
            if repeat:  # the first round warms up
                parts[name].append({**seconds, "total": time.perf_counter() - start})
    report(args, device, parts)


def report(args, device, parts) -> None:
    medians = {
        name: {
            part: statistics.median(row.get(part, 0.0) for row in rows)
            for part in sorted({key for row in rows for key in row})
        }
        for name, rows in parts.items()
    }
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/step.py " + " ".join(
            f"--{key.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}"
            for key, v in vars(args).items() if key != "no_save"
        ),
        "machine": f"{card}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "median_seconds": medians,
    }  # fmt: skip
    base = medians.get("openclip", {}).get("total")
    for name, row in medians.items():
        share = row.get("normalizer", 0.0) / row["total"]
        ratio = f"{row['total'] / base:.3f} x openclip" if base else ""
        print(f"{name:12} {row['total']:.3f} s  {ratio}  normalizer {share:.2%} of the step", row)
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        name = f"step_{args.model}_b{args.batch_size}_m{args.num_prototypes}_{device.type}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
