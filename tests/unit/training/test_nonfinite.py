"""Verdicts are read late, and none is lost."""

import json
import math

import pytest
import torch

from neuclip.errors import UserError
from neuclip.run_folder import RunFolder
from neuclip.training.nonfinite import Readback
from neuclip.training.nonfinite_watch import Watch
from step_parts import CPU, batch


def readback(loss: float = 1.0, stop: bool = False) -> Readback:
    voted_down = not math.isfinite(loss)
    return Readback(torch.tensor([voted_down, stop, loss, 1.0, 0.05, 0, 0, 0, 0]), 12)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def late(folder: RunFolder, limit: int) -> Watch:
    """As on CUDA: one step late."""
    return Watch(limit, folder, torch.device("cuda"))


def test_a_step_is_judged_once_the_next_was_asked_for(folder):
    watch = late(folder, 1)
    watch.add(1, 0.1, [batch(1)], readback(math.nan))
    assert watch.skipped == 0
    watch.add(2, 0.1, [batch(2)], readback())
    assert watch.skipped == 1
    watch.add(3, 0.1, [batch(3)], readback(math.inf))
    with pytest.raises(UserError, match=r"the loss is inf; step 3, temperature 0\.05, .*0\.1; "):
        watch.settle()
    assert watch.skipped == 2
    listed = json.loads((folder.path / "nonfinite_step_3_rank_0.json").read_text())
    assert listed["keys"] == batch(3).keys
    assert listed["sample_ids"] == batch(3).sample_ids.tolist()


def test_the_cpu_is_judged_at_once(folder):
    watch = Watch(0, folder, CPU)
    watch.add(1, 0.1, [batch(1)], readback())
    with pytest.raises(UserError, match="--max-nonfinite-steps \\(now 0\\)"):
        watch.add(2, 0.1, [batch(2), batch(3)], readback(math.nan))
    listed = json.loads((folder.path / "nonfinite_step_2_rank_0.json").read_text())
    assert listed["keys"] == batch(2).keys + batch(3).keys


def test_being_asked_to_stop_is_heard_as_late_everywhere(folder):
    watch = late(folder, 0)
    watch.add(1, 0.1, [batch(1)], readback(stop=True))
    assert not watch.stop
    watch.add(2, 0.1, [batch(2)], readback())
    watch.add(3, 0.1, [batch(3)], readback())
    assert watch.stop
