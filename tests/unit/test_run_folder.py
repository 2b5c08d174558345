"""The paths of a run folder, and which of the two forms of a checkpoint it means."""

import os
from pathlib import Path

import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.checkpoint.common import SUMS
from neuclip.config.recipes import read_yaml
from neuclip.errors import UserError
from neuclip.evaluation.outcomes import read_outcomes
from neuclip.evaluation.results import read_eval_results, read_gallery
from neuclip.files import open_to_append
from neuclip.run_folder import RunFolder, open_clip_flags, read_records, record_lines


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


def special(path, kind):
    """A file that a stranger may put in place of one that is read."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**36)


SPECIAL = ["pipe", "device", "folder", "64 GiB"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_files_of_a_run_folder_that_are_no_files(tmp_path, kind):
    folder = RunFolder(tmp_path)
    folder.eval_results.mkdir()
    paths = {
        folder.metrics: read_records,
        folder.config: read_yaml,
        folder.results(1): read_eval_results,
        folder.gallery("val"): read_gallery,
    }
    for path, read in paths.items():
        special(path, kind)
        with pytest.raises(UserError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    special(folder.open_clip_flags, kind)
    with pytest.raises(OSError, match=r"regular|directory|more than"):
        open_clip_flags(folder.open_clip_flags)
    special(folder.split_outcomes("val").parent, "folder")
    special(folder.split_outcomes("val"), kind)
    assert read_outcomes(folder.split_outcomes("val")) is None


@pytest.mark.parametrize("kind", SPECIAL)
def test_checkpoints_and_sums_that_are_no_files(tmp_path, kind):
    storage.save(tmp_path / "epoch_1.pt", {"state_dict": {"a": torch.zeros(2)}})
    (tmp_path / SUMS).unlink()
    special(tmp_path / SUMS, kind)
    special(tmp_path / "epoch_2.pt", kind)
    found = storage.furthest_complete(tmp_path)
    assert found is not None and found.path.name == "epoch_1.pt"
    if kind != "64 GiB":  # of which the first bytes are looked at
        with pytest.raises(UserError):
            storage.load(tmp_path / "epoch_2.pt")


def test_a_line_longer_than_any_record_is_broken(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "' + b"a" * 2**22 + b'"}\n{"step": 3}\n')
    assert record_lines(path) == [{"step": 1}, None, {"step": 3}]


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    special(tmp_path / "out.log", "pipe")
    with pytest.raises(OSError, match=r"No such device|regular"):
        open_to_append(tmp_path / "out.log")
