"""Kills a run (`kill -9`) at random moments, resumes it, and compares it with an undisturbed run.

    python benchmarks/chaos.py --kills 20
    python benchmarks/chaos.py --kills 20 --method neuclip
    python benchmarks/chaos.py --kills 20 --label fp16 --precision amp_fp16

One run is undisturbed. Another is killed after random times, including its loaders and checkpoint
writers, and continued with `--resume auto` each time; after the last kill it runs to its end. Final
weights, optimiser, prototypes, records and the multiset of samples read must be equal. Writes
`chaos_LABEL.json` into benchmarks/results/; the label is the method unless `--label` names another.
Further flags go to `neuclip train`.
"""

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from neuclip.checkpoint import storage
from neuclip.data.demo.build import tiny_demo
from neuclip.run_folder import BEST, read_records

RESULTS = Path(__file__).parent / "results"
TIMES = {"samples_per_second", "memory_mb", "seconds"}


def flags(folder: Path, name: str, args: argparse.Namespace) -> list[str]:
    """The command line of a run; `args` are those of `parse`."""
    return [
        "--method", args.method, "--train-data", str(folder / "data" / "train"),
        "--val-data", str(folder / "data" / "unseen_face_development"), "--model", args.model,
        "--batch-size", "16", "--epochs", str(args.epochs), "--warmup", "5", "--workers", "2",
        "--lr", "1e-3",
        "--save-every-steps", "4", "--log-every-n-steps", "3", "--device", "cpu",
        "--logs", str(folder / "logs"), "--name", name, "--resume", "auto", *args.more,
    ]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "neuclip.training.main", *words],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{number}")
    else:
        yield path, value


def differences(one: Path, other: Path, epochs: int) -> list[str]:
    """The entries that differ between two run folders, except times."""
    found = []
    for name in (f"epoch_{epochs}.pt", BEST):
        if not (one / "checkpoints" / name).exists():
            continue
        first, second = (dict(leaves(storage.load(run / "checkpoints" / name)))
                         for run in (one, other))  # fmt: skip
        for path, value in first.items():
            own = second[path]
            same = torch.equal(value, own) if torch.is_tensor(value) else value == own
            if not same and path not in {"/name", "/neuclip/config"}:
                found.append(f"{name}{path}")
    records = [
        [{k: v for k, v in r.items() if k not in TIMES and not k.startswith("share_")}
         for r in read_records(run / "metrics.jsonl")]
        for run in (one, other)
    ]  # fmt: skip
    if records[0] != records[1]:
        found.append("metrics.jsonl")
    return found


def undisturbed(folder: Path, words: list[str]) -> tuple[float, float]:
    """Runs to the end; returns the seconds until the first checkpoint, and until the end."""
    checkpoints, begin = folder / "logs/undisturbed/checkpoints", time.monotonic()
    process, seen = start(words), 0.0
    while process.poll() is None:
        if not seen and any(checkpoints.glob("iter_*.pt")):
            seen = time.monotonic() - begin
        time.sleep(0.05)
    assert process.returncode == 0
    return seen, time.monotonic() - begin


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments that both scripts of this kind have; what is left goes to `neuclip train`."""
    parser.add_argument("--method", default="neuclip_pool")
    parser.add_argument("--model", default="glyph-tiny")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--label", help="in the name of the result file (default: the method)")
    parser.add_argument("--seed", type=int, default=0)
    args, args.more = parser.parse_known_args()
    return args


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    args = parse(parser)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_demo(folder / "data", characters=64)
        begin, total = undisturbed(folder, flags(folder, "undisturbed", args))
        kills, after = 0, []
        while True:
            process = start(flags(folder, "killed", args))
            if kills == args.kills:
                assert process.wait() == 0
                break
            # From the end of start-up on; a third of the steps at most, to leave some.
            pause = draw.uniform(0.9 * begin, begin + (total - begin) / 3)
            try:
                process.wait(pause)
                print(f"finished before kill {kills + 1}")
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            kills += 1
            records = read_records(folder / "logs/killed/metrics.jsonl")
            after.append(records[-1]["step"] if records else 0)
            print(f"kill {kills} after {pause:.1f} s, last recorded step {after[-1]}", flush=True)
        found = differences(folder / "logs/undisturbed", folder / "logs/killed", args.epochs)
        last = read_records(folder / "logs/killed/metrics.jsonl")
        fingerprint = [r for r in last if r["kind"] == "train"][-1]["samples_fingerprint"]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/chaos.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "kills": kills,
        "last_recorded_step_at_each_kill": after,
        "samples_fingerprint": fingerprint,
        "differences": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"chaos_{args.label or args.method}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print("differences:", found or "none")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
