"""The check of a GPU: parts in processes of their own, and every part at toy size on the CPU."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_check import (
    demo_curve,
    exactness,
    gpu_tests,
    loss_forms,
    reading,
    step_parts,
    two_processes,
    zero_shot_speed,
)
from gpu_check.facts import Facts
from gpu_check.part import Job, Part
from gpu_check.plan import PARTS
from gpu_check.runner import Check

ROOT = Path(__file__).parents[2]
CPU = Facts("cpu", "x86_64", (0, 0), 0.0, 0.0, {})
OLD = Facts("cuda", "Tesla T4", (7, 5), 14.6, 14.2, {})
BUSY = Facts("cuda", "NVIDIA A100", (8, 0), 39.4, 3.0, {})


def part(module, **more):
    return Part(module, module, f"what {module} asks", 1.0, **more)


@pytest.fixture
def job(tmp_path):
    return Job("the part", "cpu", True, tmp_path, tmp_path / "results.jsonl")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_part_that_cannot_run_says_why():
    new, large = part("a", capability=(8, 0)), part("a", gib=10)
    assert "Tesla T4 has compute capability 7.5; this part is for 8.0" in new.obstacle(OLD)
    assert large.obstacle(BUSY) == "10 GiB wanted, 3.0 of 39.4 GiB free on NVIDIA A100"
    assert "no_such_module missing" in part("a", packages=("no_such_module", "json")).obstacle(CPU)
    assert new.obstacle(BUSY) is large.obstacle(CPU) is new.obstacle(CPU) is None


def test_the_parts_that_an_old_card_leaves_out_are_those_of_bfloat16():
    assert [each.name for each in PARTS if each.capability > (7, 5)] == ["step", "losses"]
    assert sum(each.minutes for each in PARTS) == pytest.approx(8)


def test_the_others_run_when_parts_fail_and_hang(tmp_path, monkeypatch, capsys):
    scripts = tmp_path / "scripts" / "gpu_check"
    scripts.mkdir(parents=True)
    child = """
        import sys, json, time
        module, job = sys.argv[1], json.loads(sys.argv[2])
        def record(**row):
            with open(job["results"], "a") as file:
                file.write(json.dumps({"part": job["part"], **row}) + "\\n")
        record(value=1)
        if module == "gpu_check.broken":
            sys.exit("the cause in words")
        if module == "gpu_check.hanging":
            time.sleep(60)
    """
    (scripts / "__init__.py").touch()
    (scripts / "child.py").write_text(textwrap.dedent(child))
    monkeypatch.setattr("gpu_check.runner.ROOT", tmp_path)
    (tmp_path / "scripts").rename(tmp_path / "benchmarks")
    parts = [part("broken"), part("hanging"), part("absent", packages=("nothing",)), part("good")]
    check = Check(CPU, tmp_path, tmp_path, minutes=8 / 60, toy=True)
    assert check.run(parts) == 2
    found = rows(check.results)
    outcomes = {row["part"]: row["outcome"] for row in found if "outcome" in row}
    assert outcomes == {
        "broken": "failed", "hanging": "stopped", "absent": "left out", "good": "passed",
    }  # fmt: skip
    assert [row["part"] for row in found if "value" in row] == ["broken", "hanging", "good"]
    assert "broken     failed: the cause in words" in capsys.readouterr().out
    assert "--- hanging: what hanging asks" in check.log.read_text()


def test_no_part_starts_when_the_time_is_over(tmp_path):
    check = Check(CPU, tmp_path, tmp_path, minutes=1e-6, toy=True)
    assert check.run([part("late")]) == 0
    assert rows(check.results)[0]["why"] == "no time is left of 1e-06 minutes"


def test_the_forms_of_the_loss_at_toy_size(job):
    loss_forms.run(job)
    found = rows(job.results)
    assert found[0]["left_out"] == "fused kernels"
    names = {row["loss"] for row in found if "milliseconds" in row}
    assert {"ClipLoss", "blocks", "blocks bfloat16", "SigLipLoss", "siglip"} <= names
    assert all(row["value_error"] < 1e-2 for row in found if "value_error" in row)


def test_a_wrong_loss_fails_the_part(job, monkeypatch):
    monkeypatch.setitem(loss_forms.LIMITS, "value_error", 0.0)
    with pytest.raises(SystemExit, match=r"differ from float64: .*'blocks', 'value_error'"):
        loss_forms.run(job)


def test_the_parts_of_a_step_at_toy_size(job):
    step_parts.run(job)
    found = [row for row in rows(job.results) if "method" in row]
    assert {row["method"] for row in found} == set(step_parts.METHODS)
    assert all(row["utilisation"] > 0 and row["tflop"] > 0 for row in found)


def test_two_ranks_are_compared_with_one_process():
    one = two_processes.steps("neuclip_pool", "cpu")
    halves = [
        {"neuclip_pool": {"values": one["values"], "grads": 2 * one["grads"][:, :, rows]}}
        for rows in (slice(0, 32), slice(32, 64))
    ]
    assert max(two_processes.compare(halves, one, "neuclip_pool").values()) < 1e-7
    halves[0]["neuclip_pool"]["grads"] *= 1.01
    assert two_processes.compare(halves, one, "neuclip_pool")["gradient_error"] > 1e-3


def test_zero_shot_at_toy_size(job):
    zero_shot_speed.run(job)
    (row,) = rows(job.results)
    assert row["samples"] == 24
    assert 0 < row["waiting"] < 1


def test_reading_at_toy_size(job):
    reading.run(job)
    alone, with_steps = rows(job.results)
    assert alone["images_per_second"] > 0
    assert 0 <= with_steps["waiting_for_data"] < 1


def test_exactness_at_toy_size(job):
    exactness.run(job)
    accumulation, resume = rows(job.results)
    assert accumulation["accumulation_changes_first_losses_by"] < 1e-5
    assert resume["different"] == 0
    assert resume["has_average"]


def test_the_demo_at_toy_size(job):
    demo_curve.run(job)
    trained, compared = rows(job.results)
    assert trained["trained_on"] == "cpu"
    assert compared["steps"] == 20
    assert compared["losses_differ_by"] == 0  # both ran on the CPU


def report(test, outcome, when="call"):
    failed = outcome == "failed"
    return SimpleNamespace(
        nodeid=f"tests/gpu/{test}", outcome=outcome, when=when, failed=failed, longreprtext="why\n"
    )


def test_each_failed_test_is_recorded_at_once(job):
    recorder = gpu_tests.Recorder(job)
    recorder.pytest_runtest_logreport(report("a.py::one", "passed", "setup"))
    recorder.pytest_runtest_logreport(report("a.py::one", "passed"))
    recorder.pytest_runtest_logreport(report("a.py::two", "failed"))
    assert [row["test"] for row in rows(job.results)] == ["tests/gpu/a.py::two"]
    recorder.pytest_runtest_logreport(report("b.py::three", "skipped", "setup"))
    recorder.finish_file()
    assert [{k: v for k, v in row.items() if k != "part"} for row in rows(job.results)[1:]] == [
        {"file": "tests/gpu/a.py", "passed": 1, "failed": 1},
        {"file": "tests/gpu/b.py", "skipped": 1},
    ]


def test_the_script(tmp_path):
    words = ["--device", "cpu", "--parts", "open_clip", "--out", tmp_path / "out", "--minutes", "2"]
    done = subprocess.run(
        ["sh", ROOT / "scripts/gpu_check.sh", *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts, part, total = rows(tmp_path / "out" / "results.jsonl")
    assert facts["toy"]
    assert facts["versions"]["torch"]
    assert part["outcome"] == ("passed" if find_spec("webdataset") else "left out")
    assert total["failed"] == 0
