import errno
import hashlib
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from neuclip.checkpoint import storage
from neuclip.checkpoint.saver import Saver
from neuclip.checkpoint.storage import CheckpointError


def content():
    return {"epoch": 1, "name": "run", "state_dict": nn.Linear(2, 3).state_dict(), "optimizer": {}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    saved = content()
    storage.save(tmp_path / "new" / "epoch_1.pt", saved)
    loaded = storage.load(tmp_path / "new" / "epoch_1.pt")
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["state_dict"]["weight"], saved["state_dict"]["weight"])
    assert names(tmp_path / "new") == ["SHA256SUMS", "epoch_1.pt"]


def test_a_missing_checkpoint_names_the_others(tmp_path):
    storage.save(tmp_path / "epoch_2.pt", content())
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*epoch_3\.pt; there are: epoch_2"
    ):
        storage.load(tmp_path / "epoch_3.pt")


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("kept", [0, 10, 400, -1])
def test_a_truncated_checkpoint_is_damaged(tmp_path, kept, summed):
    path = tmp_path / "epoch_1.pt"
    storage.save(path, content())
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    if not summed:
        (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"damaged or incomplete|not a file of plain"):
        storage.load(path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "evil": Evil()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            storage.load(Path(name))
    assert not Path("executed").exists()


def test_something_else_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no 'state_dict'"):
        storage.load(tmp_path / "list.pt")


def test_weights_of_another_architecture(tmp_path):
    with pytest.raises(CheckpointError, match=r"2 of other shape \(first: bias\)"):
        storage.load_weights(nn.Linear(2, 4), content()["state_dict"], tmp_path / "epoch_1.pt")
    with pytest.raises(
        CheckpointError, match=r"2 missing \(first: 0.bias\), 2 unknown \(first: bias\)"
    ):
        weights = content()["state_dict"]
        storage.load_weights(nn.Sequential(nn.Linear(2, 3)), weights, tmp_path / "x.pt")


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "epoch_latest.pt"
    storage.save(path, content())
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left"):
        storage.save(path, content())
    assert path.read_bytes() == before
    assert names(tmp_path) == ["SHA256SUMS", "epoch_latest.pt"]


@pytest.mark.parametrize("room", [0, 100, 2000, 50_000, 130_000])
def test_a_disk_that_fills_at_any_write(tmp_path, room):
    """One error in words, and every checkpoint that was whole stays whole; at 0 to all bytes."""
    saved = {**content(), "weights": torch.zeros(40_000)}
    saver = Saver(sharded=False, keep_step_checkpoints=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(CheckpointError) as caught, saver.open():
        saver.save(tmp_path / "iter_1.pt", saved)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            saver.save(tmp_path / "iter_2.pt", saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(
        r"cannot write checkpoint .*iter_2\.pt: File too large; free some space .* complete",
        str(caught.value),
    )
    assert names(tmp_path) == ["SHA256SUMS", "epoch_latest.pt", "iter_1.pt"]
    for name in ("epoch_latest.pt", "iter_1.pt"):
        assert storage.load(tmp_path / name)["weights"].shape == (40_000,)


def test_latest_is_the_same_file_and_old_steps_go(tmp_path):
    for step in (5, 10, 20):
        path = tmp_path / f"iter_{step}.pt"
        storage.save(path, {**content(), "epoch": step})
        storage.point_latest_at(path)
    storage.drop_old_step_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == [
        "SHA256SUMS", "epoch_latest.pt", "iter_10.pt", "iter_20.pt",
    ]  # fmt: skip
    assert storage.load(tmp_path / "epoch_latest.pt")["epoch"] == 20
    storage.drop_old_step_checkpoints(tmp_path, keep=1)
    assert storage.load(tmp_path / "epoch_latest.pt")["epoch"] == 20


def test_latest_is_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage.save(tmp_path / "epoch_1.pt", content())
    storage.point_latest_at(tmp_path / "epoch_1.pt")
    assert storage.load(tmp_path / "epoch_latest.pt")["epoch"] == 1


def test_one_flipped_bit_is_found(tmp_path):
    path = tmp_path / "epoch_1.pt"
    storage.save(path, {**content(), "weights": torch.zeros(1000)})
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="its SHA-256 is none of those in SHA256SUMS"):
        storage.load(path)


def test_sums_are_as_sha256sum_reads_them_and_do_not_pile_up(tmp_path):
    for step in range(20):
        storage.save(tmp_path / f"iter_{step}.pt", content())
        storage.drop_old_step_checkpoints(tmp_path, keep=2)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert len(lines) <= 6
    digest, name = lines[-1].split("  ")
    assert name == "iter_19.pt"
    assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def at_step(step):
    return {**content(), "neuclip": {"step": step}}


def test_the_furthest_whole_checkpoint(tmp_path):
    """By its step: a copy without times, or a clock that jumps, changes nothing."""
    assert storage.furthest_complete(tmp_path / "nothing") is None
    assert storage.furthest_complete(tmp_path) is None
    steps = {"iter_5.pt": 5, "epoch_1.pt": 10, "iter_15.pt": 15, "epoch_2.pt": 20, "iter_9.pt": 9}
    for name, step in steps.items():
        storage.save(tmp_path / name, at_step(step))
    storage.point_latest_at(tmp_path / "iter_9.pt")
    for order in (sorted(steps.values()), sorted(steps.values(), reverse=True)):
        for name, time in zip(sorted(steps, key=steps.get), order, strict=True):
            os.utime(tmp_path / name, (time, time))
        assert storage.furthest_complete(tmp_path).path == tmp_path / "epoch_2.pt"
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, copy_function=shutil.copyfile)
    for name in ("epoch_2.pt", "iter_15.pt", "epoch_1.pt"):
        assert storage.furthest_complete(copy).path == copy / name
        (copy / name).write_bytes(b"half")
    assert storage.furthest_complete(copy).path.name in {"iter_9.pt", "epoch_latest.pt"}


@pytest.mark.parametrize("what", ["foreign", "link", "folder", "unreadable", "sums", "no sums"])
def test_trifles_do_not_block_a_resume(tmp_path, what):
    for step in (1, 2):
        storage.save(tmp_path / f"iter_{step}.pt", at_step(step))
    storage.save(tmp_path / "epoch_1.pt", at_step(3))
    sums = tmp_path / "SHA256SUMS"
    if what == "foreign":
        (tmp_path / "weights of a friend.pt").write_bytes(b"x")
        torch.save({"state_dict": {}}, tmp_path / "best.pt")
    elif what == "link":
        (tmp_path / "iter_9.pt").symlink_to(tmp_path / "gone.pt")
        (tmp_path / "epoch_9").symlink_to(tmp_path / "gone")
    elif what == "folder":
        (tmp_path / "epoch_9.pt").mkdir()
        (tmp_path / "notes").mkdir()
    elif what == "unreadable":
        (tmp_path / "iter_3.pt").symlink_to("/proc/self/mem")
    elif what == "sums":
        sums.write_bytes(b"\n\xff\xfe\n  \nabc\n" + sums.read_bytes() + b"0123abc")
    else:
        sums.unlink()
        sums.mkdir()
    assert storage.furthest_complete(tmp_path).path == tmp_path / "epoch_1.pt"
    if what != "no sums":
        storage.save(tmp_path / "iter_4.pt", at_step(4))
        storage.drop_old_step_checkpoints(tmp_path, keep=2)
        assert storage.furthest_complete(tmp_path).path == tmp_path / "iter_4.pt"


def test_a_sum_belongs_to_its_file(tmp_path):
    """A checkpoint under the name of another one is not the one that was written there."""
    for step in (1, 2):
        storage.save(tmp_path / f"iter_{step}.pt", at_step(step))
    shutil.copyfile(tmp_path / "iter_1.pt", tmp_path / "iter_2.pt")
    with pytest.raises(CheckpointError, match=r"iter_2\.pt is damaged"):
        storage.verify(tmp_path / "iter_2.pt")
    assert storage.furthest_complete(tmp_path).path == tmp_path / "iter_1.pt"


@pytest.mark.parametrize("kept", [0, 400, -1, None])
def test_without_sums_the_zip_archive_is_checked(tmp_path, kept):
    """Cut off, or one flipped bit: torch itself does not compare the checksums of its archive."""
    for step in (1, 2):
        saved = {**content(), "weights": torch.zeros(1000)}
        storage.save(tmp_path / f"iter_{step}.pt", saved)
        os.utime(tmp_path / f"iter_{step}.pt", (step, step))
    (tmp_path / "SHA256SUMS").unlink()
    assert storage.furthest_complete(tmp_path).path == tmp_path / "iter_2.pt"
    damaged = bytearray((tmp_path / "iter_2.pt").read_bytes())
    if kept is None:
        damaged[len(damaged) // 2] ^= 1
    else:
        del damaged[kept:]
    (tmp_path / "iter_2.pt").write_bytes(damaged)
    assert storage.furthest_complete(tmp_path).path == tmp_path / "iter_1.pt"


def test_what_is_verified_is_hashed_once_and_not_loaded(tmp_path, monkeypatch):
    storage.save(tmp_path / "iter_1.pt", content())
    hashed, loaded = [], []
    digest, load = hashlib.file_digest, torch.load
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: hashed.append(a) or digest(*a))
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    found = storage.furthest_complete(tmp_path)
    assert (len(hashed), len(loaded)) == (1, 0)
    storage.load(found)
    assert (len(hashed), len(loaded)) == (1, 1)
    storage.load(found.path)
    assert (len(hashed), len(loaded)) == (2, 2)


def test_a_torn_line_of_sums_does_not_spoil_the_next(tmp_path):
    """An earlier version appended lines in place: a killed process could leave half of one."""
    (tmp_path / "SHA256SUMS").write_text("0123abc")
    storage.save(tmp_path / "iter_1.pt", content())
    assert storage.load(tmp_path / "iter_1.pt")["epoch"] == 1


def test_leftovers_of_killed_saves_are_no_checkpoints_and_go_with_the_next(tmp_path):
    storage.save(tmp_path / "iter_1.pt", content())
    (tmp_path / ".iter_2.pt.123.partial").write_bytes(b"half")
    (tmp_path / ".epoch_1.partial").mkdir()
    (tmp_path / ".epoch_1.partial" / "SHA256SUMS").write_text("")
    assert storage.furthest_complete(tmp_path).path == tmp_path / "iter_1.pt"
    saver = Saver(sharded=False, keep_step_checkpoints=2)
    with saver.open():
        saver.save(tmp_path / "iter_2.pt", content())
    assert names(tmp_path) == ["SHA256SUMS", "epoch_latest.pt", "iter_1.pt", "iter_2.pt"]


def test_a_folder_of_checkpoints_that_became_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
        storage.save(tmp_path / "checkpoints" / "iter_1.pt", at_step(1))
    assert "\n" not in str(caught.value)
    assert storage.furthest_complete(tmp_path / "checkpoints") is None
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_latest_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    saver = Saver(sharded=False, keep_step_checkpoints=2)
    monkeypatch.setattr(storage, "point_latest_at", refuse)
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*iter_2\.pt: Read-only"),
        saver.open(),
    ):
        saver.save(tmp_path / "iter_2.pt", content())
