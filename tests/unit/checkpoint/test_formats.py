import argparse
import json
import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from neuclip.checkpoint import formats
from neuclip.checkpoint.common import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(())}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "no_ending"])
def test_the_content_decides_not_the_name(tmp_path, name):
    for write in (
        lambda path: save_file(WEIGHTS, path),
        lambda path: torch.save(WEIGHTS, path),
        lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    ):
        write(tmp_path / name)
        found = formats.read(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True), np.arange(3),
        argparse.Namespace(lr=1.0, out=Path("x")), types.SimpleNamespace(a=1), OrderedDict(a=1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_values_beside_the_weights(tmp_path, value):
    torch.save({"state_dict": WEIGHTS, "more": {"value": value}}, tmp_path / "x.pt")
    found = formats.read(tmp_path / "x.pt")["more"]["value"]
    assert type(found) is type(value)
    assert np.array_equal(found, value)


def test_numpy_numbers_of_older_versions(tmp_path):
    torch.save({"loss": np.float64(1.5)}, tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            old.writestr(name, content.replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core." in (tmp_path / "old.pt").read_bytes()
    assert formats.read(tmp_path / "old.pt")["loss"] == 1.5


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).half()
        self.register_buffer("input_resolution", torch.tensor(224))
        self.part = nn.Parameter(torch.arange(12.0).reshape(3, 4).T[1:])  # a view with strides
        self.flag, self.sizes = True, [1, 2]

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("traced", [False, True])
def test_the_tensors_of_torchscript(tmp_path, traced, monkeypatch):
    module = Scripted().eval()
    example = torch.ones(1, 3, dtype=torch.half)
    made = torch.jit.trace(module, example) if traced else torch.jit.script(module)
    torch.jit.save(made, str(tmp_path / "x.pt"))
    monkeypatch.setattr(torch.jit, "load", None)  # the program is not loaded
    found = formats.read(tmp_path / "x.pt")["torchscript"]
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def rewritten(path, change):
    """A TorchScript archive with another `data.pkl`."""
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            data = change(value) if name.endswith("/data.pkl") else value
            if data is not None:
                archive.writestr(name, data)


def test_torchscript_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewritten(tmp_path / "x.pt", lambda _: pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"could run code.*getattr"):
        formats.read(tmp_path / "x.pt")
    assert not Path("executed").exists()


def test_a_tensor_outside_of_its_storage(tmp_path):
    rewritten(tmp_path / "x.pt", lambda data: data.replace(b"(K\x02K\x02t", b"(K\x7fK\x02t"))
    with pytest.raises(CheckpointError, match=r"damaged.*lies outside of its storage"):
        formats.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<html>404</html>", "is not a file of weights: it is an HTML page"),
        (b"", r"damaged or incomplete .0 bytes.: an empty file"),
        (b"hello", "its first bytes are those of no known format"),
        (b"\x93NUMPY\x01", "it is a NumPy array"),
        (json.dumps({"weight_map": {}}).encode(), "the index of weights in several files"),
        (b'{"embed_dim": 8}', "a JSON file; a model configuration is given as --model"),
        (pickle.dumps({"a": 1}), "it is a bare pickle"),
    ],
)
def test_what_else_a_file_may_be(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        formats.read(tmp_path / "x.pt")


def test_archives_that_are_not_torchs(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("photos/1.jpg", b"")
    with pytest.raises(CheckpointError, match=r"it is a zip archive of photos/1\.jpg"):
        formats.read(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_other_classes_are_named_and_not_loaded(tmp_path, zipped):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        formats.read(tmp_path / "x.pt")


LOOP = [torch.ones(2).expand(10**6, 2)]
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}},
        {"neuclip": {"loss": {"slots": [torch.ones(8).as_strided((2**30, 8), (0, 1))]}}},
        {"a": torch.empty(10**6, 10**6, device="meta")},
        LOOP,
    ],
    ids=["repeated", "nested", "meta", "list in itself"],
)
def test_tensors_of_which_little_is_stored(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="numbers that are not all stored"):
        formats.read(tmp_path / "x.pt")


def test_views_that_are_stored_are_read(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    content = {"a": shared.T, "b": shared, "c": shared[1:], "d": torch.ones(5).expand(1, -1)}
    torch.save(content, tmp_path / "x.pt")
    found = formats.read(tmp_path / "x.pt")
    assert all(torch.equal(found[key], value) for key, value in content.items())


@pytest.mark.parametrize("scripted", [False, True])
def test_an_archive_that_unpacks_to_far_more(tmp_path, scripted):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
        if scripted:
            archive.writestr("x/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="a compressed zip archive of 4,000,"):
        formats.read(path)
