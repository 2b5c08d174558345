"""Which of the two forms of a checkpoint a run folder means."""

import os

import torch

from neuclip.checkpoint import storage
from neuclip.checkpoint.common import SUMS
from neuclip.run_folder import RunFolder


def sharded(path, age=0):
    path.mkdir(parents=True)
    (path / SUMS).write_text("")
    stamp = 1_000_000_000 - age
    os.utime(path, (stamp, stamp))


def test_the_form_that_was_written_last(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.epoch_checkpoint(1).name == "epoch_1.pt"
    sharded(folder.checkpoints / "epoch_1", age=5)
    assert folder.epoch_checkpoint(1).name == "epoch_1"
    (folder.checkpoints / "epoch_1.pt").write_bytes(b"")
    assert folder.epoch_checkpoint(1).name == "epoch_1.pt"
    assert folder.step_checkpoint(3).name == "iter_3.pt"


def test_there_is_one_latest(tmp_path):
    folder = RunFolder(tmp_path)
    first, second = folder.checkpoints / "iter_1", folder.checkpoints / "iter_2.pt"
    sharded(first)
    storage.point_latest_at(first)
    assert folder.latest.resolve() == first.resolve()
    storage.save(second, {"state_dict": {"a": torch.ones(1)}})
    storage.point_latest_at(second)
    assert folder.latest.name == "epoch_latest.pt"
    assert not (folder.checkpoints / "epoch_latest").exists()
    storage.point_latest_at(first)
    assert [p.name for p in folder.checkpoints.glob("epoch_latest*")] == ["epoch_latest"]
    sharded(folder.checkpoints / "iter_3")
    storage.drop_old_step_checkpoints(folder.checkpoints, keep=1)
    left = sorted(p.name for p in folder.checkpoints.iterdir() if p.name.startswith((".", "iter")))
    assert left == ["iter_3"]
