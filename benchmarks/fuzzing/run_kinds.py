"""Cases of run folders: configurations, records, results, resuming, and features of a search."""

import io
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from given_features import write_store

from fuzzing import valid
from fuzzing.mutation import HOSTILE_JSON, NAMES, changed_tree, damaged, flipped
from fuzzing.outcomes import command, refused
from neuclip.evaluation.outcomes import read_outcomes

_HOSTILE_YAML = (
    b"a: &a [1,1,1,1]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c]\n" * 3,
    b"a: &a\n  b: *a\n",
    b"x: " + b"[" * 5000,
    b"x: " + b"9" * 5000,
    b"!!python/object:os.system x",
    b"!!python/name:os.system",
    b"? [a]\n: b\n",
    b"a: 1\n---\nb: 2\n",
    b"\xff\xfe\0",
    b"%YAML 9.9\n--- a",
    b"a: 2001-99-99\n",
    b"a: !!binary x\n",
    b"a: !!set {x}\n",
    b"<<: 5\n",
    b"<<: [{a: 1}, 5]\n",
    b"\t",
    b"a: 1e400\n",
    b"a: 0x" + b"f" * 300,
    b"a: 190:20:30.15\n",
    b"a: |\n  " + b"x" * 10**6,
    b"{a: {b: ",
    b"- 1\n- 2\n",
    b"a: .nan\n",
    b"1: 2\n",
    b"null: 2\n",
    b'a: "\\ud800"\n',
    b"a: '\x1b]0;x'\n",
    b"? {a: b}\n: c\n",
    b"a: &x 1\nb: *y\n",
    b"a: " + b"-" * 5000,
    b"a: " + b"1_" * 3000,
)


def _yaml(rng: random.Random) -> bytes:
    whole = (valid.run_folder() / "config.yaml").read_bytes()
    change = rng.random()
    if change < 0.25:
        return rng.choice(_HOSTILE_YAML)
    if change < 0.7:
        tree = changed_tree(yaml.safe_load(whole), rng)
        try:
            return yaml.dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass")
        except RecursionError:  # PyYAML writes less deeply than it reads
            return b"[" * 5000
    return damaged(whole, rng)


def _config(folder: Path, rng: random.Random) -> str:
    """`neuclip train --config FILE --dry-run`."""
    path = folder / "config.yaml"
    path.write_bytes(_yaml(rng))
    return command(folder, ["train", "--config", str(path), "--dry-run"])


def report(run: Path) -> None:
    """A report over a run as it is."""
    with tempfile.TemporaryDirectory() as folder:
        command(Path(folder), ["report", str(run), "--out", f"{folder}/page.html"])


def _report(folder: Path, rng: random.Random) -> str:
    """`neuclip report` over a run with one or two damaged files."""
    run = valid.copied_run(folder)
    for _ in range(rng.randint(1, 2)):
        rng.choice(_DAMAGES)(run, rng)
    if rng.random() < 0.2:
        name = rng.choice(NAMES).replace("/", "_").replace("\0", "")[:100]
        if name not in (".", "..") and not name.startswith("-"):
            run = run.rename(run.with_name(name))
    page = folder / "page.html"
    outcome = command(folder, ["report", str(run), "--out", str(page)])
    if page.exists():
        assert b"<script>alert" not in page.read_bytes()
    return outcome


def _lines(path: Path, rng: random.Random) -> None:
    """Changes a file of one JSON object a line."""
    if not path.exists():
        return
    rows = path.read_bytes().splitlines()
    for _ in range(rng.randint(1, 3)):
        number = rng.randrange(len(rows))
        change = rng.random()
        try:
            tree = json.loads(rows[number])
        except ValueError:
            tree = {"step": 1}
        if change < 0.6:
            rows[number] = json.dumps(changed_tree(tree, rng)).encode("utf-8", "surrogatepass")
        elif change < 0.8:
            rows[number] = rng.choice(HOSTILE_JSON).replace(b"\n", b"")
        else:
            rows[number] = damaged(rows[number], rng)
    path.write_bytes(b"\n".join(rows) + b"\n")


def _damage_metrics(run: Path, rng: random.Random) -> None:
    _lines(run / "metrics.jsonl", rng)


def _damage_results(run: Path, rng: random.Random) -> None:
    _lines(run / "eval_results" / "epoch_2_eval_results.jsonl", rng)


def _damage_tree(run: Path, rng: random.Random) -> None:
    path = run / rng.choice(("data_report.json", "eval_results/gallery_unseen.json"))
    whole = json.loads(path.read_bytes()) if path.is_file() else {}
    text = json.dumps(changed_tree(whole, rng)).encode("utf-8", "surrogatepass")
    if path.is_file():
        path.write_bytes(rng.choice((text, text, damaged(text, rng), *HOSTILE_JSON)))


def _damage_config(run: Path, rng: random.Random) -> None:
    if (run / "config.yaml").is_file():
        (run / "config.yaml").write_bytes(_yaml(rng))


def _damage_outcomes(run: Path, rng: random.Random) -> None:
    for path in (run / "eval_results" / "outcomes").glob("*.npz"):
        path.write_bytes(_changed_npz(path.read_bytes(), rng))


def _replace(run: Path, rng: random.Random) -> None:
    """Puts a pipe, a folder, a device or a dangling link in place of a file or folder."""
    names = (
        "metrics.jsonl",
        "config.yaml",
        "data_report.json",
        "out.log",
        "checkpoints",
        "eval_results",
        "eval_results/epoch_2_eval_results.jsonl",
        "eval_results/gallery_unseen.json",
        "eval_results/outcomes/split_unseen.npz",
        "run.lock",
        "params.txt",
    )
    path = run / rng.choice(names)
    if path.is_dir() and not path.is_symlink():
        path.rename(run / "moved")
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)
    else:
        return
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.write_bytes(b"\0" * 1000)
    else:
        with path.open("wb") as file:
            file.truncate(2**36)


_DAMAGES = (
    _damage_metrics,
    _damage_metrics,
    _damage_results,
    _damage_results,
    _damage_tree,
    _damage_tree,
    _damage_config,
    _damage_outcomes,
    _replace,
)


def _changed_npz(content: bytes, rng: random.Random) -> bytes:
    change = rng.randrange(4)
    if change == 0:
        return flipped(content, rng)
    if change == 1:
        return damaged(content, rng)
    with np.load(io.BytesIO(content)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(list(arrays))
    arrays[name] = rng.choice(_arrays())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _arrays():
    return (
        np.zeros(0),
        np.zeros((3, 0)),
        np.array(-5),
        np.array(2**62),
        np.array("mean\x1b[2J"),
        np.array(1j),
        np.zeros(3, "U5"),
        np.zeros(3, "datetime64[s]"),
        np.full(40, np.nan),
        np.zeros(2**26, np.uint8),
        np.array(10**18),
        np.zeros((40, 40)),
        np.full(40, 2**31),
        np.array(b"mean"),
        np.array([True] * 40),
    )


def _outcomes(folder: Path, rng: random.Random) -> str:
    """A file of outcomes per sample."""
    whole = valid.run_folder() / "eval_results" / "outcomes" / "split_unseen.npz"
    path = folder / "outcomes.npz"
    path.write_bytes(_changed_npz(whole.read_bytes(), rng))
    return "refusal" if read_outcomes(path) is None else "answer"


_TRAIN = (
    "train --train-data synthetic:16 --model MODEL --epochs 2 --batch-size 8 --workers 0 "
    "--name run --device cpu --log-every-n-steps 1 --lr 1e-3 --save-frequency 1 "
    "--method openclip --warmup 1"
)


def _resume(folder: Path, rng: random.Random) -> str:
    """`neuclip train --resume auto` over a run folder that somebody has changed."""
    run = valid.copied_run(folder, checkpoints=True)
    for _ in range(rng.randint(1, 2)):
        if (run / "checkpoints").is_dir():
            rng.choice((_damage_checkpoints, _damage_metrics, _damage_config, _replace))(run, rng)
    model = str(valid.run_folder().parents[1] / "tiny.json")
    line = [model if word == "MODEL" else word for word in _TRAIN.split()]
    resume = rng.choice(("auto", "auto", "latest", str(run / "checkpoints" / "epoch_2.pt")))
    return command(folder, [*line, "--logs", str(run.parent), "--resume", resume])


def _damage_checkpoints(run: Path, rng: random.Random) -> None:
    checkpoints = run / "checkpoints"
    files = sorted(checkpoints.glob("*.pt"))
    path = rng.choice(files)
    change = rng.randrange(6)
    if change == 0:
        content = torch.load(path, weights_only=True)
        content["neuclip"][rng.choice(list(content["neuclip"]))] = rng.choice(
            (None, -1, "x", [], {})
        )
        path.unlink()
        torch.save(content, path)
        (checkpoints / "SHA256SUMS").unlink(missing_ok=True)
    elif change == 1:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: rng.randrange(len(content))])
    elif change == 2:
        (checkpoints / "SHA256SUMS").write_bytes(damaged(b"0" * 64 + b"  epoch_2.pt\n" * 4, rng))
    elif change == 3:
        path.unlink()
        path.symlink_to(rng.choice(("nowhere", path.name, "/dev/zero", ".")))
    elif change == 4:
        os.mkfifo(checkpoints / f"epoch_{rng.choice((3, 99))}.pt")
    else:
        (
            checkpoints / f"{rng.choice(('iter_9', 'epoch_99999999999999999999', 'x'))}.pt"
        ).write_bytes(b"x")


def _features(folder: Path, rng: random.Random) -> str:
    """The features that a search keeps on disk."""
    from neuclip.embedding.embedding_store import EmbeddingStore
    from neuclip.embedding.stored_images import StoredImages

    kept = write_store(folder / "kept", np.eye(6, 8, dtype=np.float32), shard_samples=4).folder
    path = rng.choice([path for path in sorted(kept.rglob("*")) if path.is_file()])
    content = path.read_bytes()
    if path.suffix == ".json":
        tree = changed_tree(json.loads(content), rng)
        content = rng.choice((json.dumps(tree).encode(), *HOSTILE_JSON))
    elif path.suffix == ".npy" and rng.random() < 0.4:
        buffer = io.BytesIO()
        np.save(buffer, rng.choice(_arrays()))
        content = buffer.getvalue()
    else:
        content = rng.choice((damaged, flipped))(content, rng)
    path.write_bytes(content)
    if rng.random() < 0.1:
        path.unlink()
        os.mkfifo(path)
    return refused(lambda: _rows(StoredImages.open(EmbeddingStore.open(kept))))


def _rows(found) -> None:
    assert 0 < len(found) <= 6 and found.row_of(3) in (None, *range(6))
    for _, rows in found.blocks():
        assert rows.ndim == 2 and np.isfinite(rows).all()


KINDS = {
    "config": _config,
    "report": _report,
    "outcomes": _outcomes,
    "resume": _resume,
    "features": _features,
}
