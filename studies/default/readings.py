"""NeuCLIP's readings with small encoders: short runs of the published method, one reading each.

    python -m studies.default.readings --data demo-data

The full encoders' cells are in the study's plan (`run.py run --match 'reading_*'`).
"""

import argparse
from pathlib import Path

import torch

from studies.default.plan import READINGS, Cell
from studies.default.small import Data, SmallRun

BASE = {
    "name": "neuclip", "num_prototypes": 2048, "restart_steps": 32, "gamma": 0.4, "rho": 3.5,
    "epsilon": 1e-14, "temperature_gradient": "exact",
}  # fmt: skip
"""The published method's best settings in the study's short runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args.data)
    for label, changed in READINGS.items():
        cell = Cell("reading", label, {**BASE, **changed}, 0.002, seed=args.seed, epochs=2)
        found = SmallRun(cell, data).train()
        scores = [f"{100 * each['acc1']:.1f}" for each in found.get("evaluations", [])]
        print(label, " / ".join(scores) or found["failed"], flush=True)


if __name__ == "__main__":
    main()
