"""Cases of weights: checkpoints, sharded ones, TorchScript, repositories, and sums."""

import io
import json
import pickletools
import random
import shutil
import struct
import zipfile
from pathlib import Path

import torch

from fuzzing import valid
from fuzzing.mutation import HOSTILE_JSON, NAMES, changed_tree, damaged, flipped
from fuzzing.outcomes import command, refused
from neuclip.checkpoint import storage
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from neuclip.model.opened_checkpoint import open_checkpoint


def _checkpoint(folder: Path, rng: random.Random) -> str:
    """A file of weights of any format, changed anywhere, or in its structure."""
    ending, content = rng.choice(valid.plain_forms())
    change = rng.randrange(4)
    if change == 0 and content.startswith(b"PK"):
        content = _changed_member(content, rng)
    elif change == 1 and ending == "safetensors":
        content = _changed_safetensors(content, rng)
    elif change == 2:
        content = rng.choice((flipped(content, rng), flipped(content, rng, 0, 400), content[:-99]))
    else:
        content = damaged(content, rng)
    path = folder / f"weights.{ending}"
    path.write_bytes(content)
    return refused(lambda: _looked_at(path))


def _looked_at(path: Path) -> None:
    """What `--pretrained` and `eval` ask of a checkpoint before they build towers."""
    found = open_checkpoint(CheckpointChoice(path))
    if found.recorded_architecture is not None:
        assert found.architecture.config
    assert found.config is None or found.config.method
    assert found.step >= 0 and found.results.name


def _changed_member(content: bytes, rng: random.Random) -> bytes:
    """An archive with another pickle, or another small member, and correct checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/code")]
        pickles = [name for name in names if name.endswith(".pkl")]
        name = rng.choice(pickles if rng.random() < 0.8 else names)
        old = archive.read(name)
    change = _changed_pickle if name in pickles and rng.random() < 0.6 else damaged
    return valid.rezipped(content, {name: change(old, rng)})


def _changed_pickle(content: bytes, rng: random.Random) -> bytes:
    """A pickle in which one operation has another argument, or is left out, or repeated."""
    places = [place for _, _, place in pickletools.genops(content) if place is not None]
    places.append(len(content))
    number = rng.randrange(len(places) - 1)
    start, end = places[number], places[number + 1]
    piece = content[start:end]
    hostile = (
        b"", piece * 2, piece * 5000, b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
        b"X\xff\xff\xff\x7f", b"N", b"]", b"}", b"0", b"2", b"cos\nsystem\n", b"cbuiltins\neval\n",
        b"ctorch\nload\n", b"\x8c\x07\x1b]0;x\x07y", b"Q", b"R", b"G\x7f\xf0\0\0\0\0\0\0", b"h\xff",
        b"j\xff\xff\xff\x7f", b"I" + b"9" * 5000 + b"\n", b"(" * 3000, b"\x8e" + b"\xff" * 8,
    )  # fmt: skip
    return content[:start] + rng.choice(hostile) + content[end:]


def _changed_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    tree = changed_tree(json.loads(content[8 : 8 + length]), rng)
    head = json.dumps(tree).encode("utf-8", "replace")
    if rng.random() < 0.2:
        head = rng.choice(HOSTILE_JSON)
    size = rng.choice((len(head),) * 5 + (2**62, 0, 99_999_999))
    return struct.pack("<Q", size) + head + content[8 + length :]


def _entries(folder: Path, rng: random.Random) -> str:
    """A checkpoint whose entries are of other types, values and shapes."""
    content = torch.load(io.BytesIO(valid.small_checkpoint()), weights_only=True)
    own = content["neuclip"]
    if rng.random() < 0.4:
        own["architecture"] = changed_tree(own["architecture"], rng)
    elif rng.random() < 0.4:
        own["config"] = rng.choice(
            (
                damaged(own["config"].encode(), rng).decode("utf-8", "replace"),
                "a: &a [*a]",
                "[" * 99,
            )
        )
    else:
        plain = {key: value for key, value in own.items() if not isinstance(value, torch.Tensor)}
        plain["damage"] = {"total": 1, "by_kind": {}, "by_shard": {}, "examples": []}
        own = changed_tree({**plain, "loss": {}}, rng)
    tops = {"neuclip": own, "state_dict": content["state_dict"], "epoch": 1, "name": "x"}
    if rng.random() < 0.3:
        tops[rng.choice(list(tops))] = rng.choice((None, 5, "x", [], {}, torch.zeros(2), {"a": 1}))
    if rng.random() < 0.2:
        weights = dict(content["state_dict"])
        weights[rng.choice(NAMES)] = rng.choice((torch.zeros(0), torch.tensor(float("nan")), 7))
        tops["state_dict"] = weights
    path = folder / "x.pt"
    path.write_bytes(valid.saved(tops))
    return refused(lambda: _looked_at(path))


def _sharded(folder: Path, rng: random.Random) -> str:
    """A sharded checkpoint with a changed file, and sums that fit it."""
    path = folder / "epoch_1"
    shutil.copytree(valid.sharded(), path)
    file = path / rng.choice((".metadata", ".metadata", "values.pt", "__0_0.distcp", "SHA256SUMS"))
    if not file.exists():
        file = path / ".metadata"
    content = file.read_bytes()
    if file.name == ".metadata":
        content = rng.choice((damaged, flipped, _changed_pickle))(content, rng)
    elif file.name == "values.pt" and rng.random() < 0.5:
        content = _changed_member(content, rng)
    else:
        content = damaged(content, rng)
    file.write_bytes(content)
    if file.name != "SHA256SUMS":
        lines = [
            f"{storage.sha256(each)}  {each.name}\n"
            for each in path.iterdir()
            if each.name != "SHA256SUMS"
        ]
        (path / "SHA256SUMS").write_text("".join(lines))
    return refused(lambda: _looked_at(path))


def _sums(folder: Path, rng: random.Random) -> str:
    """Checkpoints of a run with damaged sums, or with names that no run gives."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    content = valid.small_checkpoint()
    for name in rng.sample(("epoch_1.pt", "epoch_2.pt", "iter_4.pt", "epoch_latest.pt", "x.pt"), 3):
        (checkpoints / name).write_bytes(content if rng.random() < 0.6 else damaged(content, rng))
    digest = storage.sha256(next(iter(checkpoints.iterdir())))
    lines = f"{digest}  epoch_1.pt\n{digest}  epoch_2.pt\n{digest} *iter_4.pt\n".encode()
    sums = checkpoints / "SHA256SUMS"
    special = rng.random()
    if special < 0.15:
        sums.mkdir()
    elif special < 0.3:
        _pipe(sums)
    elif special < 0.9:
        sums.write_bytes(damaged(lines, rng) + rng.choice((b"", b"\xff\n", b"\n" * 10**5)))
    for name in rng.sample(NAMES, 3):
        with_name = name.replace("/", "_").replace("\0", "")[:50] + ".pt"
        if with_name != "..pt":
            (checkpoints / with_name).write_bytes(b"x")
    if rng.random() < 0.3:
        _pipe(checkpoints / "epoch_9.pt")
    if rng.random() < 0.3:
        (checkpoints / "epoch_10").mkdir()
        (checkpoints / "epoch_10" / "SHA256SUMS").write_bytes(damaged(lines, rng))
    return refused(lambda: storage.furthest_complete(checkpoints))


def _pipe(path: Path) -> None:
    import os

    os.mkfifo(path)


def _repository(folder: Path, rng: random.Random) -> str:
    """A repository of open_clip's or transformers', opened and built as `eval` does."""
    place = folder / "repository"
    place.mkdir()
    if rng.random() < 0.5:
        from safetensors.torch import save_file

        whole = json.loads(valid.repository()["open_clip_config.json"])
        tree = changed_tree(whole, rng)
        _write_json(place / "open_clip_config.json", tree, whole, rng)
        save_file(valid.weights(), place / "open_clip_model.safetensors")
    else:
        tree = changed_tree(valid.TRANSFORMERS, rng)
        _write_json(place / "config.json", tree, valid.TRANSFORMERS, rng)
        processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [1, 1, 1], "resample": 3}
        _write_json(
            place / "preprocessor_config.json", changed_tree(processor, rng), processor, rng
        )
        (place / "model.safetensors").write_bytes(dict(valid.plain_forms())["safetensors"])
    if rng.random() < 0.2:
        for file in place.glob("*.safetensors"):
            file.write_bytes(damaged(file.read_bytes()[:50_000], rng))
    return refused(lambda: load_pretrained(CheckpointChoice(place), "cpu"))


def _write_json(path: Path, tree: object, whole: object, rng: random.Random) -> None:
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = rng.choice((damaged(json.dumps(whole).encode(), rng), *HOSTILE_JSON))
    if path.name == "config.json" and b'"model_type"' not in text:
        text += b' "model_type"'
    path.write_bytes(text)


def _eval(folder: Path, rng: random.Random) -> str:
    """`neuclip eval` of a run whose checkpoint is changed in its structure."""
    run = valid.copied_run(folder, checkpoints=True)
    path = run / "checkpoints" / "epoch_2.pt"
    content = torch.load(path, weights_only=True)
    own = content["neuclip"]
    change = rng.randrange(4)
    if change == 0:
        own["architecture"] = changed_tree(own["architecture"], rng)
    elif change == 1:
        own["loss"] = changed_tree({"a": 1, "b": [2]}, rng)
    elif change == 2:
        name = rng.choice(list(content["state_dict"]))
        content["state_dict"][name] = rng.choice(
            (torch.zeros(0), torch.zeros(3, 3), torch.tensor(float("nan")), torch.zeros(1).bool())
        )
    else:
        for key in rng.sample(list(own), 2):
            own[key] = rng.choice((None, -1, 10**18, "x", [], {}, 1.5, torch.zeros(2)))
    (run / "checkpoints" / "SHA256SUMS").unlink()
    path.unlink()
    path.write_bytes(valid.saved(content))
    data = ["--val-data", "synthetic:8", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    return command(folder, ["eval", str(path), *data])


KINDS = {
    "checkpoint": _checkpoint,
    "entries": _entries,
    "sharded": _sharded,
    "sums": _sums,
    "repository": _repository,
    "eval": _eval,
}
