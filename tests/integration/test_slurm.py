"""The scripts of scripts/slurm, run by bash with `srun` and `scontrol` that only take notes."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from neuclip.cli.app import main

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
PUBLISHED = {
    "time": "2-00:00:00",
    "mem": "120G",
    "nodes": "2",
    "gres": "gpu:4",
    "ntasks-per-node": "4",
    "cpus-per-task": "6",
    "job-name": "neuclip",
    "output": "./job_output/%x_%j.log",
}


@pytest.fixture
def job(tmp_path):
    """Runs a script; what srun and scontrol were called with is in `calls`."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls"
    note = f'printf "%s\\n" "$(basename "$0") $*" >> {calls}\n'
    address = f'echo "$MASTER_ADDR:$MASTER_PORT" >> {calls}\nexit "$SRUN_CODE"\n'
    # The note first: `head` may close the pipe at any time.
    nodes = 'if [ "$1 $2" = "show hostnames" ]; then echo node-a; echo node-b; fi\n'
    for name, text in {"srun": note + address, "scontrol": note + nodes}.items():
        (tools / name).write_text("#!/bin/bash\n" + text)
        (tools / name).chmod(0o755)

    def run(script, srun_code, *more):
        environ = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SRUN_CODE": str(srun_code),
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "6",
            "SLURM_JOB_ID": "77",
        }
        command = ["bash", str(SCRIPTS / script), *more]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", ["dfn14m.sh", "dfn14m_requeue.sh"])
def test_srun_gets_the_published_run(job, script):
    code, calls = job(script, 0, "--train-data", "my shards")
    assert code == 0
    assert calls[0] == "scontrol show hostnames node-[a-b]"
    assert calls[2] == "node-a:12805"
    words = shlex.split(calls[1])
    assert words[:4] == ["srun", "--cpus-per-task=6", "--kill-on-bad-exit=0", "--wait=120"]
    assert words[4:8] == ["python", "-u", "-m", "neuclip.training.main"]
    assert words[8:10] == ["--recipe", "neuclip-dfn14m"]
    assert calls[1].endswith("--train-data my shards")
    assert len(calls) == 3


def test_the_header_is_the_published_one():
    for script, own in {
        "dfn14m.sh": {},
        "dfn14m_requeue.sh": {"time": "04:00:00", "signal": "USR1@120", "open-mode": "append"},
    }.items():
        header = (SCRIPTS / script).read_text()
        found = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", header, re.MULTILINE))
        assert found == PUBLISHED | own
    assert re.search(r"^#SBATCH --requeue$", header, re.MULTILINE)


@pytest.mark.parametrize(("srun_code", "again"), [(75, True), (138, True), (0, False), (1, False)])
def test_a_stopped_run_goes_back_into_the_queue(job, srun_code, again):
    code, calls = job("dfn14m_requeue.sh", srun_code)
    assert "--resume auto" in calls[1]
    assert (calls[-1] == "scontrol requeue 77") == again
    assert code == (0 if again else srun_code)


def test_a_failed_run_is_reported(job):
    assert job("dfn14m.sh", 3)[0] == 3


def as_slurm(monkeypatch, **more):
    values = {"PROCID": "0", "NTASKS": "8", "LOCALID": "0", "STEP_ID": "0", **more}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_dry_run_shows_the_batch_of_all_tasks(monkeypatch, capsys):
    """No process waits for another, and MASTER_ADDR is not needed."""
    as_slurm(monkeypatch)
    assert main(["train", "--recipe", "neuclip-dfn14m", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("# pairs per step: 4096 = 512 x 8 processes\n")


def test_dry_run_shows_what_keeps_the_batch_on_fewer_tasks(monkeypatch, capsys):
    as_slurm(monkeypatch, NTASKS="2")
    line = ["train", "--recipe", "neuclip-dfn14m", "--global-batch-size", "4096", "--dry-run"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("# pairs per step: 4096 = 512 x 4 micro-batches x 2 processes\n")


def test_dry_run_names_numbers_of_tasks_that_can_share(monkeypatch, capsys):
    as_slurm(monkeypatch, NTASKS="6")
    line = ["train", "--recipe", "neuclip-dfn14m", "--global-batch-size", "4096", "--dry-run"]
    assert main(line) == 2
    assert "by 6 processes; 1, 2, 4, 8 can" in " ".join(capsys.readouterr().err.split())


def test_one_task_prints(monkeypatch, capsys):
    as_slurm(monkeypatch, PROCID="3")
    assert main(["train", "--recipe", "neuclip-dfn14m", "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_a_missing_address(monkeypatch, capsys, tmp_path):
    as_slurm(monkeypatch)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "12805")
    line = ["train", "--train-data", str(tmp_path), "--logs", str(tmp_path / "logs")]
    assert main([*line, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "the run has 8 processes, but MASTER_ADDR is not set" in said
    assert "export MASTER_ADDR=$(scontrol show hostnames" in said
    assert not (tmp_path / "logs").exists()
