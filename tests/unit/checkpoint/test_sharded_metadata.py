"""`.metadata` of a sharded checkpoint is a pickle: no name in it imports or runs anything."""

import hashlib
import pickle
import sys
import warnings

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from neuclip.checkpoint import sharded, storage
from neuclip.checkpoint.common import CheckpointError


def with_sums(folder):
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def checkpoint(tmp_path):
    """A sharded checkpoint of one tensor."""
    path = tmp_path / "epoch_1"
    warnings.simplefilter("ignore")  # the process is alone
    save({"state_dict/w": torch.ones(3)}, storage_writer=FileSystemWriter(path), no_dist=True)
    torch.save({"state_dict": {"w": {"neuclip.sharded": "state_dict/w"}}}, path / "values.pt")
    with_sums(path)
    return path


def rewrite(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with_sums(checkpoint)


def test_whole(checkpoint):
    assert torch.equal(storage.load(checkpoint)["state_dict"]["w"], torch.ones(3))


def named(module, name):
    """A pickle that looks a name up, as both old and new protocols spell it."""
    old = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
    words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
    return old, b"\x80\x04" + words + b"\x93."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("planted", "float32"),
        ("planted.inner", "bfloat16"),
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch", "float32.__class__"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("pathlib", "PosixPath.unlink"),
        ("pathlib", "Path"),
        ("torch\x1b[2J", "float32"),
    ],
)
def test_no_other_name_is_looked_up(checkpoint, tmp_path, monkeypatch, module, name):
    """Even if `python -m` puts the current folder, with a file of that name, first."""
    (tmp_path / "planted").mkdir()
    for place in ("planted/__init__.py", "planted/inner.py"):
        (tmp_path / place).write_text(
            "import torch\nfloat32 = bfloat16 = torch.float32\nopen('ran', 'w').close()\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for content in named(module, name):
        rewrite(checkpoint, content)
        with pytest.raises(CheckpointError, match="not a file of plain tensors") as caught:
            storage.load(checkpoint)
        assert str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists() and "planted" not in sys.modules


@pytest.mark.parametrize("place", ["../secret.distcp", "/etc/passwd", "values.pt", 7])
def test_tensors_are_in_files_of_the_folder(checkpoint, place):
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    places = {key: _StorageInfo(place, 0, 8) for key in whole.storage_data}
    rewrite(checkpoint, pickle.dumps(Metadata(whole.state_dict_metadata, storage_data=places)))
    with pytest.raises(CheckpointError, match="names the file"):
        storage.load(checkpoint)


def damaged_metadata(whole, what):
    described, places = whole.state_dict_metadata, whole.storage_data
    if what == "huge":
        described["state_dict/w"].size = torch.Size([10**15])
    elif what == "negative":
        described["state_dict/w"].size = torch.Size([-3])
    elif what == "no size":
        described["state_dict/w"].size = "x"
    elif what == "no places":
        places = {}
    elif what == "other places":
        places = {MetadataIndex("other"): _StorageInfo("__0_0.distcp", 0, 8)}
    elif what == "offset":
        places = {key: _StorageInfo("__0_0.distcp", 10**9, 8) for key in places}
    elif what == "other names":
        described = {"other": described["state_dict/w"]}
    else:
        described, places = 4, "x"
    return Metadata(described, storage_data=places)


@pytest.mark.parametrize(
    "what",
    ["huge", "negative", "no size", "no places", "other places", "offset", "other names", "types"],
)
def test_metadata_that_contradicts_the_files_is_one_line(checkpoint, what):
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    rewrite(checkpoint, pickle.dumps(damaged_metadata(whole, what)))
    with pytest.raises(CheckpointError, match="damaged or incomplete") as caught:
        storage.load(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["empty", "bytes", "other name", "shard", "outside", "flipped"])
def test_every_file_that_is_read_has_its_own_sum(checkpoint, what):
    sums = checkpoint / "SHA256SUMS"
    text = sums.read_text()
    if what == "empty":
        sums.write_text("")
    elif what == "bytes":
        sums.write_bytes(b"\xff\n")
    elif what == "other name":
        sums.write_text(text.replace("values.pt", "other.pt"))
    elif what == "shard":
        sums.write_text("".join(line for line in text.splitlines(True) if "distcp" not in line))
    elif what == "outside":
        (checkpoint.parent / "x").write_bytes(b"x")
        sums.write_text(text + f"{hashlib.sha256(b'x').hexdigest()}  ../x\n")
    else:
        shard = next(checkpoint.glob("*.distcp"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not as it was written"):
        storage.verify(checkpoint)
    assert sharded.is_sharded(checkpoint) and checkpoint.is_dir()
