"""Compares open_clip's trainer with neuclip's: throughput side by side, and loss curves.

    python benchmarks/against_open_clip.py --model glyph-tiny --batch-size 64 --epochs 2 --rounds 3

Both train the same model on the same shards of the embedded data, with the same batch, precision,
optimiser, schedule and steps; neuclip uses `--method openclip`. The trainers take turns, with one
seed per round. open_clip's trainer needs packages that neuclip does not need, so a separate
environment is created once in a cache folder (`--environment`). It sees the packages of the present
environment and adds open_clip's extra `training` and webdataset 0.2.86, at the versions in
constraints.txt. `--environment here` takes the present environment, which must have them: on a
machine without network (CONTRIBUTING.md).

Samples per second count from the first to the last training record, including epoch boundaries and
their checkpoints. CPU seconds cover the full process from its start, with its workers; they are the
steadier measure on a shared machine. Writes `against_open_clip_MODEL_bBATCH_DEVICE.json` and the
loss curves as SVG into benchmarks/results/.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from recorded import RESULTS, check_version, save

import neuclip
from neuclip.data.demo.build import tiny_demo
from neuclip.errors import UserError
from neuclip.model.architecture import model_names
from neuclip.model.device import choose_device
from neuclip.run_folder import read_records

FORMAT = 1
ROOT = Path(__file__).parents[1]
NEEDED = ("open_clip_torch[training]==3.3.0", "webdataset==0.2.86")
CONFIGS = Path(neuclip.__file__).parent / "model" / "model_configs"
OPEN_CLIP = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
LINE = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/.* Loss: ([0-9.naif]+)")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="glyph-tiny")
    parser.add_argument(
        "--characters", type=int, default=512, help="characters in the embedded data"
    )
    parser.add_argument("--image-side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="per epoch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each process")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp_bf16", "bf16"])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log-every", type=int, default=2, help="steps between two records")
    parser.add_argument("--device", default="auto")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--environment", type=Path, default=cache / "neuclip" / "open_clip_trainer")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args(words)


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        samples_per_second: from the first to the last training record.
        cpu_seconds: CPU seconds of the full run.
        losses: [records, 2] steps done and the loss of the last one.
    """

    samples_per_second: float
    cpu_seconds: float
    losses: list[tuple[int, float]]


def main() -> None:
    args = arguments()
    name = f"against_open_clip_{args.model}_b{args.batch_size}"
    try:
        device = choose_device(args.device)
        check_arguments(args)
    except UserError as error:
        raise SystemExit(f"cannot measure on this machine: {error}") from None
    path = RESULTS / f"{name}_{device.type}.json"
    if not args.no_save:
        check_version(path, FORMAT)
    rounds = measure(args, device)
    content = report(rounds)
    print(json.dumps(content["neuclip_over_open_clip"], indent=1))
    if not args.no_save:
        save(path, FORMAT, device, content)
        draw(rounds, path.with_suffix(".svg"))


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what the parser cannot.

    Raises:
        UserError: the model is unknown, or there are too few rounds.
    """
    if args.model not in model_names():
        raise UserError(f"unknown model {args.model!r}")
    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds}: the noise of a loss needs at least 2")


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, list[Outcome]]:
    """The runs of both trainers, in turns, on data made for them."""
    rounds: dict[str, list[Outcome]] = {"open_clip": [], "neuclip": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        summary = tiny_demo(data, characters=args.characters, size=args.image_side)
        check_pairs(args, summary.pairs["train"])
        python = environment(args.environment)
        for seed in range(args.rounds):
            for trainer, run in (("open_clip", open_clip), ("neuclip", ours)):
                logs = Path(folder) / f"{trainer}_{seed}"
                found = run(args, python, data, logs, seed, device.type)
                rounds[trainer].append(found)
                line = f"round {seed + 1}: {trainer:9} {found.samples_per_second:8.1f} samples/s, "
                line += f"{found.cpu_seconds:7.1f} CPU seconds"
                print(f"{line}, last loss {found.losses[-1][1]:.4f}", flush=True)
                shutil.rmtree(logs)
    return rounds


def check_pairs(args: argparse.Namespace, pairs: int) -> None:
    """Refuses an epoch that would repeat pairs: the trainers repeat them in different ways."""
    wanted = args.batch_size * args.steps
    if wanted > pairs:
        raise SystemExit(
            f"{args.steps} steps of {args.batch_size} need {wanted} pairs, the data have {pairs}: "
            "lower --steps or raise --characters"
        )


def environment(folder: Path) -> str:
    """The interpreter of an environment with open_clip's trainer, created at the first call."""
    if str(folder) == "here":
        return sys.executable
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text(encoding="utf-8").split() == list(NEEDED):
        return str(python)
    print(f"making open_clip's environment in {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    # pip then finds the packages of this environment, such as torch, and installs the rest.
    seen = Path(asked.stdout.strip()) / "seen.pth"
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    seen.write_text("\n".join(packages) + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", *NEEDED]
    subprocess.run([*install, "--constraint", ROOT / "constraints.txt"], check=True)
    ready.write_text(" ".join(NEEDED), encoding="utf-8")
    return str(python)


# --- the trainers ---------------------------------------------------------------------------


def common(args: argparse.Namespace, seed: int, device: str) -> list[str]:
    """Flags that both trainers share."""
    return [
        "--train-num-samples", str(args.batch_size * args.steps), "--model", args.model,
        "--batch-size", str(args.batch_size), "--epochs", str(args.epochs), "--lr", str(args.lr),
        "--warmup", str(args.warmup), "--workers", str(args.workers), "--seed", str(seed),
        "--precision", args.precision, "--device", device,
        "--log-every-n-steps", str(args.log_every),
        "--name", "run",
    ]  # fmt: skip


def open_clip(
    args: argparse.Namespace, python: str, data: Path, logs: Path, seed: int, device: str
) -> Outcome:
    shards = sorted((data / "train").glob("*.tar"))
    pattern = f"{data}/train/{{00000..{len(shards) - 1:05d}}}.tar"
    words = [python, "-c", OPEN_CLIP, str(CONFIGS), "--train-data", pattern]
    words += ["--dataset-type", "webdataset", *common(args, seed, device), "--logs", str(logs)]
    times, losses, begin = [], [], cpu_seconds()
    for moment, line in lines_of(args, words):
        if found := LINE.search(line):
            epoch, samples, loss = found.groups()
            times.append(moment)
            step = int(epoch) * args.steps + int(samples) // args.batch_size
            losses.append((step, float(loss)))
    seconds = times[-1] - times[0]
    rate = (losses[-1][0] - losses[0][0]) * args.batch_size / seconds
    return Outcome(rate, cpu_seconds() - begin, losses)


def ours(
    args: argparse.Namespace, python: str, data: Path, logs: Path, seed: int, device: str
) -> Outcome:
    words = [sys.executable, "-m", "neuclip.training.main", "--train-data", str(data / "train")]
    words += ["--method", "openclip", *common(args, seed, device), "--logs-dir", str(logs)]
    begin = cpu_seconds()
    for _ in lines_of(args, words):
        pass
    records = [r for r in read_records(logs / "run" / "metrics.jsonl") if r["kind"] == "train"]
    seconds = sum(record["seconds"] for record in records[1:])
    rate = (records[-1]["samples_seen"] - records[0]["samples_seen"]) / seconds
    return Outcome(rate, cpu_seconds() - begin, [(r["step"], r["loss"]) for r in records])


def lines_of(args: argparse.Namespace, words: Sequence[str]):
    """Runs a trainer and yields its output lines, each with its time."""
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    ) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            yield time.perf_counter(), line
    if process.returncode:
        raise SystemExit("".join(lines[-40:]) + f"\n{words[:4]} exited with {process.returncode}")


def cpu_seconds() -> float:
    """CPU seconds of all finished child processes and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the report -----------------------------------------------------------------------------


def late_loss(run: Outcome) -> float:
    """Mean of the recorded losses in the last quarter of a run."""
    last = run.losses[-1][0]
    return statistics.fmean(loss for step, loss in run.losses if step > 0.75 * last)


def report(rounds: dict[str, list[Outcome]]) -> dict:
    pairs = list(zip(rounds["neuclip"], rounds["open_clip"], strict=True))
    late = {name: [late_loss(run) for run in runs] for name, runs in rounds.items()}
    means = {name: statistics.fmean(values) for name, values in late.items()}
    spread = statistics.fmean(statistics.stdev(values) for values in late.values())
    return {
        "needed": NEEDED,
        "neuclip_over_open_clip": {
            "samples_per_second": round(
                statistics.median(a.samples_per_second / b.samples_per_second for a, b in pairs), 4
            ),
            "cpu_seconds": round(
                statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs), 4
            ),
            "late_loss_difference": round(means["neuclip"] - means["open_clip"], 4),
            "late_loss_spread_over_seeds": round(spread, 4),
        },
        "late_loss": late,
        "rounds": {name: [asdict(run) for run in runs] for name, runs in rounds.items()},
    }


def draw(rounds: dict[str, list[Outcome]], path: Path) -> None:
    """Draws every run's loss over steps, one colour per trainer."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, runs), colour in zip(rounds.items(), ("tab:orange", "tab:blue"), strict=True):
        for number, run in enumerate(runs):
            steps, losses = zip(*run.losses, strict=True)
            axes.plot(steps, losses, color=colour, alpha=0.6, label=None if number else name)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss of the step")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn in {path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
