"""Kills or pauses one rank at a random step: the other ranks must stop, and the run must resume.

    python benchmarks/chaos_ranks.py --times 10

One run of several ranks is undisturbed. In another, a random rank is killed (`kill -9`) or paused
for ever (SIGSTOP) at a random step, several times. The script records the time until the last of
the other ranks has exited, and its message, and resumes the run with `--resume auto`. After the
last disturbance the run continues to its end, and its checkpoint must be bit-identical to the
undisturbed run's. The ranks are started as srun starts them, so only they can notice a failure.
Writes `chaos_ranks_LABEL_RANKS.json` into benchmarks/results/. Further flags go to
`neuclip train`.
"""

import argparse
import datetime
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from chaos import differences, flags, parse

from neuclip.data.demo.build import tiny_demo
from neuclip.run_folder import read_records

RESULTS = Path(__file__).parent / "results"


class Run:
    """The ranks of a run, one process each."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = flags(folder, name, args)
        words[words.index("--batch-size") + 1] = str(16 // args.processes)
        words += ["--dist-silence", str(args.silence)]
        self.output = folder / "output.txt"
        self.processes = []
        with self.output.open("a") as file:
            for rank in range(args.processes):
                environ = {
                    "SLURM_PROCID": rank, "SLURM_NTASKS": args.processes, "SLURM_LOCALID": rank,
                    "SLURM_STEP_ID": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "neuclip.training.main", *words],
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                        env={**os.environ, **{key: str(v) for key, v in environ.items()}},
                    )
                )

    def disturb(self, rank: int, number: signal.Signals) -> float:
        """Sends a signal to one rank; returns the seconds until all others have exited."""
        start = time.monotonic()
        self.processes[rank].send_signal(number)
        for other, process in enumerate(self.processes):
            if other != rank:
                code = process.wait(120)
                assert code == 1, f"rank {other} exited with {code}"
        seconds = time.monotonic() - start
        self.processes[rank].kill()
        self.processes[rank].wait()
        return seconds


def last_step(folder: Path) -> int:
    path = folder / "logs/disturbed/metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


def chaos(folder: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    draw, found = random.Random(args.seed), []
    for _ in range(args.times):
        run, before = Run(folder, "disturbed", args), last_step(folder)
        step, rank = before + draw.randrange(1, 7), draw.randrange(args.processes)
        number = draw.choice([signal.SIGKILL, signal.SIGSTOP])
        while last_step(folder) < step and run.processes[0].poll() is None:
            time.sleep(0.05)
        if run.processes[0].poll() is not None:
            print("finished before the disturbance")
            break
        seconds = run.disturb(rank, number)
        said = [line for line in run.output.read_text().splitlines() if "stopped: " in line]
        found.append({
            "process": rank, "signal": number.name, "at_step": last_step(folder),
            "seconds_until_all_stopped": round(seconds, 1), "said": said[-1] if said else None,
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--silence", type=float, default=10.0)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_demo(folder / "data", characters=64)
        assert all(process.wait() == 0 for process in Run(folder, "undisturbed", args).processes)
        found = chaos(folder, args)
        assert all(process.wait() == 0 for process in Run(folder, "disturbed", args).processes)
        differ = differences(folder / "logs/undisturbed", folder / "logs/disturbed", args.epochs)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/chaos_ranks.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; gloo on loopback",
        "processes": args.processes,
        "dist_silence": args.silence,
        "disturbances": found,
        "longest_until_all_stopped": max(f["seconds_until_all_stopped"] for f in found),
        "differences": differ,
    }
    path = RESULTS / f"chaos_ranks_{args.label or args.method}_{args.processes}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("differences:", differ or "none")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
