"""Reading the variables of torchrun and Slurm."""

import os

import pytest

from neuclip.errors import UserError
from neuclip.parallel.launch import ALONE, Launch, launch_environment, rendezvous_address


@pytest.fixture
def environ(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ENVIRONMENT",
        }:  # fmt: skip
            monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


def slurm(put, **more):
    put(**{f"SLURM_{name}": value for name, value in more.items()})


def refusal():
    with pytest.raises(UserError) as caught:
        launch_environment()
    return str(caught.value)


def test_by_hand(environ):
    assert launch_environment() == ALONE


def test_torchrun(environ):
    environ(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1)
    slurm(environ, PROCID=0, NTASKS=2, LOCALID=0, STEP_ID=0)  # torchrun started by srun
    assert launch_environment() == Launch(5, 8, 1)


def test_srun(environ):
    slurm(environ, PROCID=5, NTASKS=8, LOCALID=1, STEP_ID=0)
    assert launch_environment() == Launch(5, 8, 1)


def test_a_step_smaller_than_its_job(environ):
    slurm(environ, PROCID=1, NTASKS=8, STEP_NUM_TASKS=2, LOCALID=1, STEP_ID=3)
    assert launch_environment() == Launch(1, 2, 1)


def test_one_task(environ):
    slurm(environ, PROCID=0, NTASKS=1, LOCALID=0, STEP_ID=0)
    assert launch_environment() == ALONE


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": 8},  # the shell of salloc
        {"SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "ENVIRONMENT": "BATCH"},
        {"SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_ID": 4294967291},
        {"SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEPID": 4294967290},
    ],
)
def test_a_shell_inside_a_job_runs_alone_with_a_warning(environ, caplog, variables, monkeypatch):
    monkeypatch.setattr("neuclip.parallel.launch.log.propagate", True)
    environ(**variables)
    assert launch_environment() == ALONE
    assert "srun did not start this process: it runs alone" in caplog.text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": 2}, "RANK, WORLD_SIZE, LOCAL_RANK must all be integers"),
        ({"WORLD_SIZE": "two", "RANK": 0, "LOCAL_RANK": 0}, "must all be integers"),
        ({"WORLD_SIZE": 2, "RANK": 2, "LOCAL_RANK": 0}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": 2, "RANK": -1, "LOCAL_RANK": 0}, "RANK is -1 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": 0, "RANK": 0, "LOCAL_RANK": 0}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": -1}, "LOCAL_RANK is -1"),
        (
            {"SLURM_NTASKS": 8, "SLURM_PROCID": 8, "SLURM_LOCALID": 0, "SLURM_STEP_ID": 0},
            "SLURM_PROCID is 8 and SLURM_NTASKS is 8",
        ),
    ],
)
def test_contradictions(environ, variables, message):
    environ(**variables)
    assert message in refusal()


@pytest.mark.parametrize("port", ["", "many", "0", "65536", "-1"])
def test_an_invalid_port(environ, port):
    environ(MASTER_ADDR="node", MASTER_PORT=port)
    with pytest.raises(UserError, match=r"MASTER_PORT (must be an integer|is not set)"):
        rendezvous_address(Launch(0, 2, 0))


def test_a_rendezvous_address(environ):
    environ(MASTER_ADDR="node", MASTER_PORT=12805)
    assert rendezvous_address(Launch(0, 2, 0)) == ("node", 12805)
