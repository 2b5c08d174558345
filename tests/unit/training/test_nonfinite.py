"""Step statuses are read one step late on CUDA, and none is lost."""

import json
import math

import pytest
import torch

from neuclip.errors import UserError
from neuclip.run_folder import RunFolder
from neuclip.training.nonfinite import FiniteOutputs, Readback, StepMonitor
from step_parts import CPU, batch


def readback(loss: float = 1.0, stop: bool = False) -> Readback:
    rejected = not math.isfinite(loss)
    return Readback(torch.tensor([rejected, stop, loss, 1.0, 0.05, 1.0, 0, 0, 0, 0]), 12)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def late(folder: RunFolder, limit: int) -> StepMonitor:
    """A monitor as on CUDA: it reads one step late."""
    return StepMonitor(limit, folder, torch.device("cuda"))


def test_cuda_steps_are_read_after_the_next_launch(folder):
    monitor = late(folder, 1)
    monitor.add(1, 0.1, [batch(1)], readback(math.nan))
    assert monitor.skipped == 0
    monitor.add(2, 0.1, [batch(2)], readback())
    assert monitor.skipped == 1
    monitor.add(3, 0.1, [batch(3)], readback(math.inf))
    with pytest.raises(UserError, match=r"step 3: the loss is inf \(temperature 0\.05, .*0\.1\)"):
        monitor.read_all()
    assert monitor.skipped == 2
    listed = json.loads((folder.path / "nonfinite_step_3_rank_0.json").read_text())
    assert listed["keys"] == batch(3).keys
    assert listed["sample_ids"] == batch(3).sample_ids.tolist()


def test_cpu_steps_are_read_at_once(folder):
    monitor = StepMonitor(0, folder, CPU)
    monitor.add(1, 0.1, [batch(1)], readback())
    with pytest.raises(UserError, match="--max-nonfinite-steps \\(now 0\\)"):
        monitor.add(2, 0.1, [batch(2), batch(3)], readback(math.nan))
    listed = json.loads((folder.path / "nonfinite_step_2_rank_0.json").read_text())
    assert listed["keys"] == batch(2).keys + batch(3).keys


def test_a_stop_request_arrives_one_step_late(folder):
    monitor = late(folder, 0)
    monitor.add(1, 0.1, [batch(1)], readback(stop=True))
    assert not monitor.stop
    monitor.add(2, 0.1, [batch(2)], readback())
    monitor.add(3, 0.1, [batch(3)], readback())
    assert monitor.stop


def test_finite_features_stay_unchanged():
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    outputs = {"image_features": features, "text_features": features * 2}
    finite = FiniteOutputs.of(outputs)
    assert all(torch.equal(finite.outputs[name], outputs[name]) for name in outputs)
    finite.outputs["text_features"].sum().backward()
    assert torch.equal(features.grad, torch.full_like(features, 2))
    assert finite.bad_rows.tolist() == [[0, 0], [0, 0]]
    assert not finite.any_bad
