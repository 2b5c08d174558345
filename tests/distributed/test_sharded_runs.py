"""Runs with --fsdp: sharded checkpoints, resumed by any number of ranks, read by every command."""

import shutil
from pathlib import Path

import pytest
import torch
from tower_tasks import run, run_counting_reads, write_where_it_fails

from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.files import sha256
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained, load_run
from neuclip.run_folder import read_records
from tiny_models import VIT

METHOD = {
    "name": "neuclip",
    "num_prototypes": 24,
    "inner_steps": 10,
    "refresh": "restart",
    "restart_steps": 2,
    "gradient": "detached",
    "gamma": 0.5,
}


@pytest.fixture(scope="module")
def tree(demo_dir, tmp_path_factory):
    """Two epochs of four steps of 24 pairs."""
    return {
        "name": "whole",
        "seed": 3,
        "device": "cpu",
        "method": METHOD,
        "data": {
            "train_data": str(demo_dir / "train"),
            "batch_size": 12,
            "train_num_samples": 96,
            "workers": 0,
        },
        "model": {"name": VIT, "model_ema_decay": 0.9},
        "parallel": {"fsdp": True},
        "optim": {"epochs": 2, "lr": 1e-3, "warmup": 2},
        "evaluation": {"val_data": str(demo_dir / "unseen_face_development"), "val_frequency": 2},
        "output": {
            "logs": str(tmp_path_factory.mktemp("sharded")),
            "save_every_steps": 3,
            "log_every_n_steps": 1,
        },
    }


@pytest.fixture(scope="module")
def whole(pool, tree):
    """An uninterrupted run of two processes."""
    folders = pool.run(2, run, tree)
    assert folders[0] == folders[1]
    assert Path(folders[0]).is_dir(), folders
    return Path(folders[0])


def other(tree, name, processes, *, fsdp=True, resume=None):
    """The same run under another name, with another number of processes."""
    return {
        **tree,
        "name": name,
        "resume": None if resume is None else str(resume),
        "data": {**tree["data"], "batch_size": 24 // processes},
        "parallel": {"fsdp": fsdp},
    }


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{number}")
    else:
        yield path, value


OF_THE_RUN = ("/name", "/neuclip/config", "/neuclip/fingerprint", "/neuclip/rng", "/neuclip/damage")


def same(one, two, tolerance=None):
    """Equal bit by bit, or to a tolerance except for the state of single ranks."""
    first, second = (dict(leaves(storage.load(path))) for path in (one, two))
    left_out = ("/name", "/neuclip/config") if tolerance is None else OF_THE_RUN
    assert first.keys() == second.keys()
    for path, value in first.items():
        if path.startswith(left_out) or path.endswith(("fused", "foreach")):
            continue
        if not torch.is_tensor(value):
            assert value == second[path], path
        elif tolerance is None:
            assert torch.equal(value, second[path]), path
        else:
            near = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(value, second[path], **near, msg=path)


def test_the_folder_has_the_content_of_a_file(whole):
    folder = whole / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "epoch_1", "epoch_2", "epoch_latest", "iter_3", "iter_6",
    ]  # fmt: skip
    assert (folder / "epoch_latest").resolve() == (folder / "epoch_2").resolve()
    content = storage.load(folder / "epoch_2")
    assert content.keys() == {
        "epoch",
        "name",
        "state_dict",
        "ema_state_dict",
        "optimizer",
        "neuclip",
    }
    assert content["neuclip"]["rngs"].shape[0] == 2
    assert not torch.equal(*content["neuclip"]["rngs"])
    weights = content["state_dict"]
    assert all(type(value) is torch.Tensor for value in weights.values())
    assert content["ema_state_dict"].keys() == weights.keys()
    parts = sorted(path.stat().st_size for path in (folder / "epoch_2").glob("*.distcp"))
    assert len(parts) == 2
    assert parts[0] > 0.8 * parts[1]


def test_evaluated_and_read_like_any_other(whole):
    records = [r for r in read_records(whole / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in records] == [8]
    restored = load_run(CheckpointChoice(whole), "cpu")
    assert restored.checkpoint.path.name == "epoch_latest"
    pretrained = load_pretrained(CheckpointChoice(whole, epoch=1), "cpu")
    assert pretrained.checkpoint.arch == VIT
    assert (
        load_run(CheckpointChoice(whole / "checkpoints" / "epoch_1"), "cpu").checkpoint.epoch == 1
    )


def test_exported_like_any_other(whole, tmp_path):
    content = storage.load(whole / "checkpoints" / "epoch_2")
    for flags, key in (("--no-ema",), "state_dict"), ((), "ema_state_dict"):
        out = tmp_path / key
        assert main(["export", str(whole), "--out", str(out), *flags]) == 0
        (file,) = out.glob("*.pt")
        exported = torch.load(file, weights_only=True)
        weights = exported.get("state_dict", exported)
        for name, value in content[key].items():
            assert torch.equal(weights[name], value), name


def test_resumed_by_two_it_is_the_same_bit_by_bit(pool, tree, whole):
    """Rank 0 alone hashes the files of the checkpoint, once; each rank reads them once."""
    folder = whole.with_name("again")
    start = folder / "checkpoints" / "iter_3"
    shutil.copytree(whole / "checkpoints" / "iter_3", start)
    shutil.copy(whole / "config.yaml", folder)
    first, second = pool.run(2, run_counting_reads, other(tree, "again", 2, resume="auto"), start)
    assert first.folder == second.folder == str(folder)
    shards = ["__0_0.distcp", "__1_0.distcp"]
    assert sorted(first.hashed) == [".metadata", *shards, "values.pt"]
    assert second.hashed == []
    assert first.loaded == second.loaded == ["values.pt"]
    same(whole / "checkpoints" / "epoch_2", folder / "checkpoints" / "epoch_2")


def test_resumed_by_three_and_by_one_unsharded(pool, tree, whole):
    start = whole / "checkpoints" / "iter_3"
    three = Path(pool.run(3, run, other(tree, "three", 3, resume=start))[0])
    same(whole / "checkpoints" / "epoch_2", three / "checkpoints" / "epoch_2", 2e-4)
    alone = Path(run(other(tree, "alone", 1, fsdp=False, resume=start)))
    same(whole / "checkpoints" / "epoch_2", alone / "checkpoints" / "epoch_2.pt", 2e-4)
    # And back: a file continues as a sharded run.
    file = alone / "checkpoints" / "epoch_1.pt"
    back = Path(pool.run(2, run, other(tree, "back", 2, resume=file))[0])
    same(whole / "checkpoints" / "epoch_2", back / "checkpoints" / "epoch_2", 2e-4)


def test_micro_batches(pool, tree, whole):
    data = {**tree["data"], "batch_size": 6, "accum_freq": 2}
    folder = Path(pool.run(2, run, {**tree, "name": "micro", "data": data})[0])
    same(whole / "checkpoints" / "epoch_2", folder / "checkpoints" / "epoch_2", 2e-4)


def test_sharded_over_one_process(tree, whole):
    torn = Path(tree["output"]["logs"]) / "single" / "checkpoints" / ".epoch_2.partial"
    torn.mkdir(parents=True)
    (torn / "__7_0.distcp").write_bytes(b"of a run that was killed while it saved")
    folder = Path(run(other(tree, "single", 1)))
    assert not (folder / "checkpoints" / "epoch_2" / "__7_0.distcp").exists()
    assert not torn.exists()
    same(whole / "checkpoints" / "epoch_2", folder / "checkpoints" / "epoch_2", 2e-4)


def test_auto_finds_the_newest_of_both_forms(tree, whole, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder, symlinks=True)
    part = next((folder / "epoch_2").glob("*.distcp"))
    assert storage.furthest_complete(folder).path == folder / "epoch_2"
    part.write_bytes(part.read_bytes()[:-1])  # corrupt: the one before it counts
    assert storage.furthest_complete(folder).path == folder / "iter_6"
    with pytest.raises(storage.CheckpointError, match=r"__._0\.distcp is not as it was written"):
        storage.load(folder / "epoch_2")
    storage.save(folder / "iter_7.pt", storage.load(folder / "iter_6"))
    assert storage.furthest_complete(folder).path == folder / "iter_7.pt"


@pytest.mark.parametrize("torn", ["partial", "no sums", "no metadata"])
def test_a_torn_save_is_not_a_checkpoint(whole, tmp_path, torn):
    folder = tmp_path / "checkpoints"
    name = ".epoch_2.partial" if torn == "partial" else "epoch_2"
    shutil.copytree(whole / "checkpoints" / "epoch_2", folder / name)
    if torn != "partial":
        (folder / name / {"no sums": "SHA256SUMS", "no metadata": ".metadata"}[torn]).unlink()
    assert storage.furthest_complete(folder) is None
    with pytest.raises(storage.CheckpointError, match=r"damaged or incomplete|no .*checkpoint"):
        storage.load(folder / "epoch_2")


def test_metadata_that_would_run_code_is_refused(whole, tmp_path):
    folder = tmp_path / "epoch_2"
    shutil.copytree(whole / "checkpoints" / "epoch_2", folder)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in lines if not line.endswith(".metadata")]
    kept.append(f"{sha256(folder / '.metadata')}  .metadata")
    (folder / "SHA256SUMS").write_text("\n".join(kept) + "\n")
    with pytest.raises(storage.CheckpointError, match=r"could run code.*os\.system"):
        storage.load(folder)


def test_a_rank_that_cannot_write_stops_all(pool, tree):
    messages = pool.run(2, write_where_it_fails, other(tree, "full", 2))
    for message in messages:
        assert message.startswith("CheckpointError: cannot write checkpoint"), message
    folder = Path(tree["output"]["logs"]) / "full" / "checkpoints"
    assert storage.furthest_complete(folder) is None
