import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuclip import files
from neuclip.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_readers_see_the_old_file_or_the_new_one(tmp_path, durable):
    path = tmp_path / "new" / "folder" / "a.json"
    with files.replacing(path, durable=durable) as file:
        file.write(b"old")
        assert not path.exists()
    with files.replacing(path, durable=durable) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["a.json"]


def test_only_a_durable_file_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    for durable in (False, True):
        with files.replacing(tmp_path / "a", durable=durable) as file:
            file.write(b"x")
        assert len(flushed) == durable


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_a_hidden_part_only(tmp_path):
    """Nothing that globs for content (`*.pt`, `*.jsonl`) finds what a kill cut off."""
    code = (
        "import os, signal, sys, pathlib; from neuclip import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "a.pt"
    killed = subprocess.run([sys.executable, "-c", code, path], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.pt.")
    assert left.suffix == ".partial"
    files.write_whole(path, "whole")
    assert path.read_text() == "whole"


def test_errors_have_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for number, text in (
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "Read-only file system"),
    ):

        def fail(_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UserError) as caught:
            files.write_whole(path, "x")
        assert str(caught.value) == f"cannot write {path}: {text}"
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*/file/a: .*(exists|directory)$"):
        files.write_whole(tmp_path / "file" / "a", "x")


@pytest.fixture
def limited():
    """Lets every write fail that would make a file longer than some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 4096])
def test_a_real_full_disk(tmp_path, limited, room):
    path = tmp_path / "a.txt"
    path.write_text("old")
    limited(room)
    with pytest.raises(UserError, match=r"^cannot write .*a\.txt: File too large$"):
        files.write_whole(path, "x" * 5000)
    with pytest.raises(UserError, match="too large"), files.writing(path):
        raise RuntimeError("what a library makes of it") from OSError(errno.EFBIG, "too large")
    with pytest.raises(RuntimeError, match="a bug"), files.writing(path):
        raise RuntimeError("a bug")
    limited(resource.RLIM_INFINITY)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one in place of a file, nor one that somebody planted under the hidden name."""
    target = tmp_path / "theirs"
    target.write_text("theirs")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    for planted in (tmp_path / "a.txt", files.partial_name(tmp_path / "b.txt")):
        planted.symlink_to(target)
    files.write_whole(tmp_path / "a.txt", "ours")
    assert not (tmp_path / "a.txt").is_symlink()
    with pytest.raises(UserError, match="cannot write"):
        files.write_whole(tmp_path / "b.txt", "ours")
    (tmp_path / "log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        files.open_to_append(tmp_path / "log")
    assert target.read_text() == "theirs"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as one, files.replacing(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), files.folder_when_complete(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    for text in ("old", "new"):
        with files.folder_when_complete(out) as folder:
            (folder / "a").write_text(text)
        assert names(tmp_path) == ["out"]
        assert (out / "a").read_text() == text


def test_a_folder_that_is_still_being_filled_is_kept(tmp_path):
    """Its age is that of its newest file; the folder itself changes only with its list of names."""
    long_ago = time.time() - 3600
    for name in ("killed", "busy"):
        staging = tmp_path / f".out.partial-{name}"
        (staging / "new").mkdir(parents=True)
        (staging / "new" / "data").write_text("")
        for path in (staging / "new" / "data", staging / "new", staging):
            os.utime(path, (long_ago, long_ago))
    os.utime(tmp_path / ".out.partial-busy" / "new" / "data")
    with files.folder_when_complete(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.partial-busy", "out"]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_home() == tmp_path / "neuclip"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert files.cache_home() == Path.home() / ".cache" / "neuclip"


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new" / "table.csv", "--out")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(UserError, match=r"--out .* is a folder: name a file"):
        files.check_writable(tmp_path, "--out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/table\.csv"):
        files.check_writable(tmp_path / "file" / "table.csv", "--out")
