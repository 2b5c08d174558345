"""One of several processes killed or paused at a random step: the others stop, and the run goes on.

    python benchmarks/chaos_ranks.py --times 10

A run of several processes is left alone. Another, of the same processes, is disturbed again and
again: one process, drawn by chance, is killed (`kill -9`) or stopped for good (SIGSTOP) at a step
drawn by chance. The time until the last of the others has ended and what it said are recorded; then
the run is started again with `--resume auto`. At last it is left to finish, and its checkpoint must
equal that of the undisturbed run, bit by bit. Processes are started as srun starts them, so that
nobody but they themselves can notice. Writes a dated JSON file into benchmarks/results/.
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
from chaos import differences, flags

from neuclip.data.demo.build import tiny_demo
from neuclip.training.records.sinks import read_records

RESULTS = Path(__file__).parent / "results"


class Run:
    """The processes of a run."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = flags(folder, name, args.method)
        words[words.index("--batch-size") + 1] = str(16 // args.processes)
        words += ["--dist-silence", str(args.silence)]
        self.output = folder / "said.txt"
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
        """Seconds until all others have ended by themselves after a signal to one."""
        start = time.monotonic()
        self.processes[rank].send_signal(number)
        for other, process in enumerate(self.processes):
            if other != rank:
                code = process.wait(120)
                assert code == 1, f"process {other} ended with {code}"
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
            print("finished before it was disturbed")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="neuclip")
    parser.add_argument("--silence", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_demo(folder / "data", characters=64)
        assert all(process.wait() == 0 for process in Run(folder, "whole", args).processes)
        found = chaos(folder, args)
        assert all(process.wait() == 0 for process in Run(folder, "disturbed", args).processes)
        differ = differences(folder / "logs/whole", folder / "logs/disturbed")
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
    path = RESULTS / f"chaos_ranks_{args.method}_{args.processes}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("differences:", differ or "none")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
