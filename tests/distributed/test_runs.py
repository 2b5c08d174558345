"""Runs of several processes: stopped, killed, and resumed with the same or another number."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from group_tasks import datacomp, neuclip_train
from ranks import Ranks

from datacomp_sets import write_suite
from integration.conftest import SMALLEST
from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.evaluation.results import read_eval_results
from neuclip.run_folder import read_records
from tiny_models import VIT, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

STEPS = 12
TIMES = {"samples_per_second", "memory_mb", "seconds"}


@pytest.fixture
def flags(demo_dir, tmp_path):
    """A command line for a run of 12 steps."""

    def make(name, batch_size, *more):
        return [
            "--train-data", str(demo_dir / "train"),
            "--train-num-samples", "96", "--epochs", "2", "--lr", "1e-3", "--warmup", "2",
            "--batch-size", str(batch_size), "--workers", "0", "--device", "cpu", "--seed", "3",
            "--save-every-steps", "2", "--log-every-n-steps", "1", "--dist-silence", "10",
            "--logs-dir", str(tmp_path / "logs"), "--name", name, "--resume", "auto", *more,
        ]  # fmt: skip

    return make


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{number}")
    else:
        yield path, value


def final(folder):
    content = dict(leaves(storage.load(folder / "checkpoints/epoch_2.pt")))
    return {key: v for key, v in content.items() if key not in {"/name", "/neuclip/config"}}


def assert_same_end(one: Path, other: Path, tolerance: float) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        if tolerance and "rng" in path:
            continue  # one state per process
        if torch.is_tensor(value):
            torch.testing.assert_close(value, second[path], rtol=tolerance, atol=tolerance)
        else:
            assert value == second[path], path


def losses(folder):
    return [r["loss"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"]


METHODS = {
    "neuclip": (
        "--method", "neuclip", "--num-prototypes", "41",
        "--restart-steps", "4", "--gamma", "0.4",
    ),
    "fastclip_v2": ("--method", "fastclip_v2"),
}  # fmt: skip


CHOSEN = ("--no-duplicates", "--val-split", "0.2", "--best-metric", "val/mean_recall@1")
"""What both processes must choose alike: the order, the held-out share and the best epoch."""


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_continues_with_another_number_of_processes(flags, tmp_path, method):
    """Three processes, one of which gets SIGUSR1, or all Ctrl-C; then two, with the same flags."""
    more = (*METHODS[method], "--train-num-samples", "384")  # 32 steps: time to stop it
    logs = tmp_path / "logs"
    whole = Ranks(tmp_path / "whole", 1, neuclip_train, flags("whole", 24, *more))
    assert whole.exit_codes() == [0]
    three = Ranks(tmp_path / "three", 3, neuclip_train, flags("moved", 8, *more))
    three.wait_for_output(0, "2/32")
    if method == "neuclip":
        three.signal(2, signal.SIGUSR1)
        assert three.exit_codes() == [75] * 3
    else:
        for rank in range(3):
            three.signal(rank, signal.SIGINT)
        assert three.exit_codes() == [130] * 3
        assert "to continue: start all processes again with: neuclip" in three.output(0)
    done = len(losses(logs / "moved"))
    assert 2 <= done < 32
    two = Ranks(tmp_path / "two", 2, neuclip_train, flags("moved", 8, *more))
    assert two.exit_codes() == [0, 0]
    assert "24 = 6 x 2 micro-batches x 2 processes" in two.output(0)
    assert "resumed" in two.output(0)
    assert two.output(1) == ""
    assert_same_end(logs / "whole", logs / "moved", tolerance=1e-7)
    assert losses(logs / "moved") == pytest.approx(losses(logs / "whole"), rel=1e-7)


def test_torchrun_restarts_a_run_after_a_kill(flags, tmp_path):
    """kill -9 for one of two processes at a random step; the end is the same, bit by bit."""
    seed = 5
    draw = random.Random(seed)
    victim, step = draw.randrange(2), draw.randrange(2, STEPS - 3)
    logs, more = tmp_path / "logs", ("--model", SMALLEST, *CHOSEN)
    whole = Ranks(tmp_path / "whole", 2, neuclip_train, flags("whole", 8, *more), "float32")
    assert whole.exit_codes() == [0, 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=1", "-m", "neuclip.training.main"]
    output = tmp_path / "torchrun.txt"
    with output.open("w") as file:
        run = subprocess.Popen(
            [*command, *flags("killed", 8, *more)],
            stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while len(losses(logs / "killed")) < step and run.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(worker(run.pid, victim), signal.SIGKILL)
        assert run.wait(300) == 0, output.read_text()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert "Signal 9" in output.read_text() or "restart" in output.read_text()
    assert "at step" in output.read_text()  # resumed
    assert_same_end(logs / "whole", logs / "killed", tolerance=0)
    kept, again = (
        storage.load(logs / name / "checkpoints/epoch_best.pt") for name in ("whole", "killed")
    )
    assert kept["epoch"] == again["epoch"]
    for name, value in kept["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    assert losses(logs / "killed") == losses(logs / "whole"), (seed, victim, step)
    saved = storage.load(logs / "killed/checkpoints/epoch_2.pt")["neuclip"]
    assert (saved["global_batch_size"], saved["step"]) == (16, STEPS)
    assert saved["loss"]["normalizer.ring.slots"].shape == (2, 128 * 16, 16)  # of the global batch


def test_an_evaluation_is_killed_and_started_again(tmp_path):
    """Two processes share the samples of every task out; one process then gives the same file."""
    write_suite(tmp_path / "sets")
    run = tmp_path / "logs" / "name"
    (run / "checkpoints").mkdir(parents=True)
    content = {"epoch": 2, "name": "name", "state_dict": tiny().towers.state_dict()}
    torch.save(content, run / "checkpoints" / "epoch_2.pt")
    words = [
        "--train_output_dir", str(run), "--data_dir", str(tmp_path / "sets"), "--epoch", "2",
        "--arch", VIT, "--device", "cpu", "--workers", "0",
    ]  # fmt: skip
    results = run / "two.jsonl"
    first = Ranks(tmp_path / "first", 2, datacomp, [*words, "--out", str(results)])
    first.wait_for_output(0, "[2/38]")
    first.close()
    done = results.read_text().splitlines()
    assert 2 <= len(done) < 38
    again = Ranks(tmp_path / "again", 2, datacomp, [*words, "--out", str(results)])
    assert again.exit_codes() == [0, 0]
    assert again.output(0).count("(reused)") == len(done)
    assert "mean of 38" in again.output(0)
    assert main(["eval", *words]) == 0
    one = run / "eval_results" / "epoch_2_eval_results.jsonl"
    assert results.read_text() == one.read_text()
    assert results.read_text().splitlines()[: len(done)] == done
    assert len(read_eval_results(results)) == 38


def worker(launcher: int, rank: int) -> int:
    """The process of a rank among a launcher's children."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environ:
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")
