"""A disk that fills at any write, whichever library writes: see the benchmark."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.files import disk_error, folder_when_complete, writing

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faulty_writers.py"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_every_change_of_every_writer_fails_in_turn():
    command = [sys.executable, SCRIPT, "--kinds", "full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 8
    assert ": 0 faults" not in done.stdout


def test_an_error_of_a_library_in_rust_names_its_cause(tmp_path):
    class SafetensorError(Exception):
        pass

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(UserError, match=r"^cannot write .*: no space left"), writing(tmp_path):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError), writing(tmp_path):
        raise SafetensorError("invalid header")
    assert disk_error(SafetensorError("not found (os error 2)")) is None


@pytest.mark.parametrize("broken", ["at first", "at both"])
def test_a_folder_that_cannot_take_its_name_leaves_the_older_one(tmp_path, monkeypatch, broken):
    """The second of two renames fails; then also the one that moves the older folder back."""
    out, rename = tmp_path / "out", Path.rename
    with folder_when_complete(out) as folder:
        (folder / "a").write_text("old")

    def fail(path, target):
        if target == out and (path.name == "new" or broken == "at both"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input"), folder_when_complete(out) as folder:
            (folder / "a").write_text("new")
    if broken == "at both":
        with pytest.raises(KeyboardInterrupt), folder_when_complete(out):
            raise KeyboardInterrupt
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("words", [["--version"], ["methods"]])
def test_a_full_disk_under_standard_output(words):
    code = "import sys; from neuclip.cli.app import main; sys.exit(main(sys.argv[1:]))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "neuclip: cannot write: no space left on the device\n"


@pytest.mark.parametrize("number", [5, 28, 30])
def test_a_write_without_a_message_of_its_own_is_one_line(number, monkeypatch, capsys):
    def fail(*_):
        try:
            raise OSError(number, os.strerror(number), "/data/x")
        except OSError:
            raise RuntimeError("unexpected pos 77376 vs 77264")  # noqa: B904  as torch does

    monkeypatch.setattr("neuclip.cli.app._dispatch", fail)
    assert main(["methods"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neuclip: cannot write /data/x: ")
