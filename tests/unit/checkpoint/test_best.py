"""The best checkpoint: whole or not at all, whatever becomes of the one it was made from."""

import shutil

import pytest
import torch

from neuclip.checkpoint import best, storage
from neuclip.checkpoint.best import keep_as_best
from neuclip.checkpoint.common import SUMS, read_sums
from neuclip.checkpoint.storage import drop_old_step_checkpoints, furthest_complete, verify


def saved(folder, step):
    path = folder / f"iter_{step}.pt"
    content = {"state_dict": {"w": torch.full((4,), float(step))}, "neuclip": {"step": step}}
    storage.save(path, content)
    return path


def step_of(path):
    return storage.load(path)["neuclip"]["step"]


def test_it_outlives_its_first_name_and_its_line(tmp_path):
    for step in range(1, 9):
        path = saved(tmp_path, step)
        if step in {2, 3}:
            assert keep_as_best(path, tmp_path) == tmp_path / "epoch_best.pt"
        drop_old_step_checkpoints(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUMS, "epoch_best.pt", "iter_8.pt"]
    assert step_of(tmp_path / "epoch_best.pt") == 3  # verified by its line on the way
    assert [name for _, name in read_sums(tmp_path)].count("epoch_best.pt") == 1


def test_a_link_that_is_impossible_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(best.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    path = saved(tmp_path, 5)
    kept = keep_as_best(path, tmp_path)
    assert not kept.samefile(path)
    assert step_of(kept) == 5


@pytest.mark.parametrize("moment", ["append_sum", "write_sums"])
def test_a_process_killed_in_between_leaves_a_whole_best(tmp_path, monkeypatch, moment):
    keep_as_best(saved(tmp_path, 1), tmp_path)
    path = saved(tmp_path, 2)
    inner = getattr(best, moment)

    def killed(*arguments):
        if moment == "append_sum":
            inner(*arguments)  # the line is there, the file is not
        raise KeyboardInterrupt

    monkeypatch.setattr(best, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        keep_as_best(path, tmp_path)
    verify(tmp_path / "epoch_best.pt")
    assert step_of(tmp_path / "epoch_best.pt") == (1 if moment == "append_sum" else 2)


def test_it_is_the_furthest_only_if_nothing_went_further(tmp_path):
    keep_as_best(saved(tmp_path, 2), tmp_path)
    later = saved(tmp_path, 3)
    assert furthest_complete(tmp_path).path == later
    later.unlink()
    assert furthest_complete(tmp_path).path.name == "iter_2.pt"  # the first name goes before
    (tmp_path / "iter_2.pt").unlink()
    assert furthest_complete(tmp_path).path.name == "epoch_best.pt"


def sharded_folder(folder, name, content):
    """A folder as a sharded checkpoint looks like, to be linked."""
    path = folder / name
    path.mkdir()
    (path / "values.pt").write_bytes(content)
    (path / SUMS).write_text("")
    return path


def test_a_sharded_checkpoint_is_linked_file_by_file(tmp_path):
    first = sharded_folder(tmp_path, "iter_1", b"one")
    assert keep_as_best(first, tmp_path) == tmp_path / "epoch_best"
    assert (tmp_path / "epoch_best/values.pt").samefile(first / "values.pt")
    second = sharded_folder(tmp_path, "iter_2", b"two")
    keep_as_best(second, tmp_path)
    shutil.rmtree(second)
    assert (tmp_path / "epoch_best/values.pt").read_bytes() == b"two"
    # A run that is continued without --fsdp replaces the other form.
    keep_as_best(saved(tmp_path, 3), tmp_path)
    assert not (tmp_path / "epoch_best").exists()
