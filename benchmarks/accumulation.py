"""Compares the CPU time of larger steps by exact accumulation with that of the steps in memory.

    python benchmarks/accumulation.py --model icon-tiny --batch-size 64

For each method, steps of 1, 4 and 16 micro-batches take turns over the same number of pairs, in one
process with one thread. A pass over a micro-batch without gradient comes before the one with it, so
a step costs more than its micro-batches by themselves. Prints and writes, for each method, the CPU
time of a pair over that of the first method's in steps of one micro-batch: the median over rounds.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from recorded import RESULTS, save

from neuclip import create_loss
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.model.clip import Clip, build_clip
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep

CPU = torch.device("cpu")
METHODS = ("openclip", "fastclip_v3", "neuclip_pool")
MICRO_BATCHES = (1, 4, 16)
SAMPLES = 2**14
"""Sample ids of the batches are below it."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="icon-tiny")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def batches(clip: Clip, size: int) -> list[Batch]:
    """As many batches as the largest step has."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            images=torch.randn(size, 3, clip.image_size, clip.image_size, generator=generator),
            tokens=clip.tokenize([f"picture {size * place + number}" for number in range(size)]),
            sample_ids=torch.randperm(SAMPLES, generator=generator)[:size],
            class_indices=torch.zeros(size, dtype=torch.int64),
            captions=[""] * size,
            keys=[""] * size,
        )
        for place in range(max(MICRO_BATCHES))
    ]


def step_of(method: str, model: str) -> tuple[TrainingStep, Clip]:
    """A step of its own model."""
    torch.manual_seed(0)
    clip = build_clip(model, "fp32", CPU)
    optimizer = Optimizer(clip.towers, resolve(RunConfig(), 1).optim, 100)
    optimizer.set_rates(1)
    table = {"num_samples": SAMPLES} if method == "fastclip_v3" else {}
    loss = create_loss(
        method, embed_dim=clip.embed_dim, total_steps=1000, steps_per_epoch=100, **table
    )
    return TrainingStep(clip, clip.towers, loss, optimizer, CPU), clip


def cpu_seconds(step: TrainingStep, given: list[Batch], micro_batches: int) -> float:
    """CPU time over all batches, in steps of so many."""
    start = time.process_time()
    for first in range(0, len(given), micro_batches):
        step(given[first : first + micro_batches])
    return time.process_time() - start


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    steps = {
        (method, count): step_of(method, args.model)[0]
        for method in METHODS
        for count in MICRO_BATCHES
    }
    given = batches(step_of(METHODS[0], args.model)[1], args.batch_size)
    rounds: list[dict[tuple[str, int], float]] = []
    for number in range(1 + args.rounds):  # the first warms up
        seconds = {key: cpu_seconds(step, given, key[1]) for key, step in steps.items()}
        base = seconds[METHODS[0], 1]
        if number > 0:
            rounds.append({key: each / base for key, each in seconds.items()})
    found = {
        method: {
            str(count * args.batch_size): round(
                statistics.median(each[method, count] for each in rounds), 3
            )
            for count in MICRO_BATCHES
        }
        for method in METHODS
    }
    for method, ratios in found.items():
        print(f"{method:14}", "  ".join(f"{pairs} pairs {r:.2f}" for pairs, r in ratios.items()))
    content = {"rounds": args.rounds, "cpu_time_of_a_pair": found}
    name = f"accumulation_{Path(args.model).stem}_b{args.batch_size}.json"
    save(RESULTS / name, 1, CPU, content)


if __name__ == "__main__":
    main()
