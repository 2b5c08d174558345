"""The paths of a run folder, and which of the two forms of a checkpoint it means."""

import os
from pathlib import Path

import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.checkpoint.common import SUMS
from neuclip.run_folder import RunFolder


def sharded(path, age=0):
    path.mkdir(parents=True)
    (path / SUMS).write_text("")
    stamp = 1_000_000_000 - age
    os.utime(path, (stamp, stamp))


def test_the_form_that_exists(tmp_path):
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


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [
        ("logs/run/checkpoints/epoch_2.pt", "logs/run"),
        ("logs/run/checkpoints/epoch_2", "logs/run"),
        ("elsewhere/best.pt", "elsewhere"),
    ],
)
def test_the_run_folder_of_a_checkpoint(checkpoint, folder):
    assert RunFolder.of_checkpoint(Path(checkpoint)) == RunFolder(Path(folder))


def test_results_by_epoch(tmp_path):
    """In the order of epochs; neither those of plain weights nor those of step checkpoints."""
    folder = RunFolder(tmp_path)
    assert folder.results_by_epoch() == {}
    expected = {epoch: folder.results(epoch) for epoch in (2, 10)}
    others = [folder.results(2, plain=True), folder.results_of("iter_40")]
    folder.eval_results.mkdir()
    for path in [*expected.values(), *others, folder.gallery("b"), folder.gallery("a")]:
        path.touch()
    assert list(folder.results_by_epoch().items()) == list(expected.items())
    assert folder.galleries() == [folder.gallery("a"), folder.gallery("b")]
