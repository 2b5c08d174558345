"""A run that was stopped, however, and resumed equals one that was not: bit by bit."""

import hashlib
import json
import os
import shlex
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from neuclip.catalogue import neuclip as family
from neuclip.catalogue.neuclip import NeuCLIPPoolSettings
from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.config.recipes import read_yaml
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_run
from neuclip.run_folder import read_records
from neuclip.training import evaluating, loss_scale
from neuclip.training.device_prefetch import DevicePrefetcher

from .conftest import DEVELOPMENT, Demo, kill_group, wait_for

NEUCLIP = (
    "--method", "neuclip", "--num-prototypes", "40", "--restart-steps", "6", "--gamma", "0.4",
)  # fmt: skip
MAY_MOVE = {"/neuclip/low_rank/given", "/neuclip/low_rank/file"}
TIMES = {"samples_per_second", "memory_mb", "seconds"}


def tensors(value, path=""):
    """All tensors and plain values of a nested checkpoint, by path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from tensors(inner, f"{path}/{number}")
    else:
        yield path, value


def assert_same_checkpoint(one, other):
    first, second = (dict(tensors(storage.load(path))) for path in (one, other))
    assert first.keys() == second.keys()
    for path, value in first.items():
        if path in {"/name", "/neuclip/config", *MAY_MOVE}:
            continue
        same = torch.equal(value, second[path]) if torch.is_tensor(value) else value == second[path]
        assert same, path


def comparable(folder):
    records = read_records(folder / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES and not k.startswith("share_")}
        for r in records
    ]


@pytest.fixture(scope="module")
def trained(demo_dir, tmp_path_factory):
    """The run that nothing interrupts. Do not write into it."""
    demo = Demo(demo_dir, tmp_path_factory.mktemp("trained"))
    assert main(["train", *demo.flags("whole", *NEUCLIP, "--save-every-steps", "3")]) == 0
    return demo.logs / "whole"


@pytest.fixture
def whole(demo, trained):
    """A copy of the run that nothing interrupts, in the test's own folder."""
    return shutil.copytree(trained, demo.logs / "whole")


def test_killed_in_mid_epoch_and_resumed(demo, whole):
    flags = demo.flags("killed", *NEUCLIP, "--save-every-steps", "3")
    process = demo.start(*flags)
    folder = demo.logs / "killed"
    wait_for((folder / "checkpoints" / "iter_12.pt").exists, process)
    kill_group(process)
    assert not (folder / "checkpoints" / "epoch_2.pt").exists()
    # Another number of reading processes changes nothing.
    assert main(["train", *flags, "--resume", "latest", "--workers", "0"]) == 0
    assert_same_checkpoint(whole / "checkpoints/epoch_2.pt", folder / "checkpoints/epoch_2.pt")
    assert comparable(folder) == comparable(whole)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "SHA256SUMS", "epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", "iter_15.pt", "iter_18.pt",
    ]  # fmt: skip


def test_float16_is_resumed_with_its_loss_scale(demo, monkeypatch):
    """From the middle of steps that overflow and of steps that count towards a larger scale."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**17)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    more = (
        "--method", "openclip", "--precision", "amp_fp16", "--accum-freq", "2", "--batch-size", "8",
        "--epochs", "1", "--val-frequency", "0", "--workers", "0", "--log-every-n-steps", "1",
        "--save-every-steps", "1", "--keep-step-checkpoints", "9", "--opt", "lion", "--lr", "1e-4",
    )  # fmt: skip
    assert main(["train", *demo.flags("first", *more)]) == 0
    records = [r for r in read_records(demo.logs / "first/metrics.jsonl") if "loss" in r]
    scales = [r["loss_scale"] for r in records]
    assert any(a < b for a, b in pairwise(scales))
    assert records[-1]["overflow_steps"] == sum(a > b for a, b in pairwise([2.0**17, *scales])) > 0
    assert records[-1]["skipped_steps"] == 0
    last = demo.logs / "first/checkpoints/epoch_1.pt"
    start = str(demo.logs / "first/checkpoints/iter_1.pt")
    assert main(["train", *demo.flags("second", *more, "--resume", start)]) == 0
    assert_same_checkpoint(last, demo.logs / "second/checkpoints/epoch_1.pt")

    # SIGTERM while the third checkpoint is written: the run stops after its step.
    saved, save = [], storage.save

    def terminated(*given, **named):
        saved.append(given)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(*given, **named)

    flags = demo.flags("third", *more, "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save", terminated)
        assert main(["train", *flags]) == 75
    step = storage.load(demo.logs / "third/checkpoints/epoch_latest.pt")["neuclip"]["step"]
    assert 3 <= step < records[-1]["step"]
    assert main(["train", *flags]) == 0
    assert_same_checkpoint(last, demo.logs / "third/checkpoints/epoch_1.pt")


def test_momentum_towers_are_resumed_with_their_queue(demo):
    """In the middle of the queue's first turn; with micro-batches, groups and another average."""
    more = (
        "--method", "moco", "--queue-size", "100", "--key-momentum", "0.9", "--accum-freq", "2",
        "--batch-size", "8", "--false-negatives", "mask", "--model-ema-decay", "0.8",
        "--epochs", "1", "--val-frequency", "0", "--workers", "0", "--log-every-n-steps", "1",
        "--save-every-steps", "3", "--keep-step-checkpoints", "9",
    )  # fmt: skip
    assert main(["train", *demo.flags("first", *more)]) == 0
    start = demo.logs / "first/checkpoints/iter_3.pt"
    saved = storage.load(start)
    assert set(saved["momentum_state_dict"]) == set(saved["state_dict"])
    averages = [saved[key]["visual.proj"] for key in ("momentum_state_dict", "ema_state_dict")]
    assert not any(torch.equal(each, saved["state_dict"]["visual.proj"]) for each in averages)
    assert not torch.equal(*averages)
    assert main(["train", *demo.flags("second", *more, "--resume", str(start))]) == 0
    ends = [demo.logs / name / "checkpoints/epoch_1.pt" for name in ("first", "second")]
    assert_same_checkpoint(*ends)


def test_a_token_head_is_resumed_and_not_part_of_the_model(demo):
    more = (
        "--method", "openclip", "--token-weight", "0.5", "--accum-freq", "2", "--batch-size", "8",
        "--epochs", "1", "--val-frequency", "0", "--workers", "0", "--log-every-n-steps", "1",
        "--save-every-steps", "3", "--keep-step-checkpoints", "9",
    )  # fmt: skip
    assert main(["train", *demo.flags("first", *more)]) == 0
    start = demo.logs / "first/checkpoints/iter_3.pt"
    assert main(["train", *demo.flags("second", *more, "--resume", str(start))]) == 0
    ends = [demo.logs / name / "checkpoints/epoch_1.pt" for name in ("first", "second")]
    assert_same_checkpoint(*ends)
    content = storage.load(ends[0])
    assert content["neuclip"]["token_head"]["captions"] == 160
    assert not any("head" in name or "tokens" in name for name in content["state_dict"])
    records = [r for r in read_records(demo.logs / "first/metrics.jsonl") if "token_loss" in r]
    assert records[-1]["token_loss"] < records[0]["token_loss"]
    for record in records:
        sides = (record["image_loss"] + record["text_loss"]) / 2
        assert record["loss"] == pytest.approx(sides + 0.5 * record["token_loss"], rel=1e-5)
    without = demo.flags("third", *more, "--resume", str(start), "--token-weight", "0")
    assert main(["train", *without]) == 2


def test_asked_to_stop_and_resumed(demo, whole):
    flags = demo.flags("asked", *NEUCLIP, "--save-every-steps", "3")
    process = demo.start(*flags)
    folder = demo.logs / "asked"
    wait_for((folder / "checkpoints" / "iter_3.pt").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "--resume auto continues" in output
    assert "Traceback" not in output
    step = storage.load(folder / "checkpoints/epoch_latest.pt")["neuclip"]["step"]
    assert step >= 3
    assert main(["train", *flags, "--resume", "latest"]) == 0
    assert_same_checkpoint(whole / "checkpoints/epoch_2.pt", folder / "checkpoints/epoch_2.pt")


INTERRUPTED = {
    "before the first step": (DevicePrefetcher, "next_step"),
    "after step 2,": (storage, "save"),  # at the end of the epoch
    "after step 2, ": (evaluating, "evaluate_sets"),
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_interrupted_and_continued_as_printed(demo, monkeypatch, capsys, where):
    """Ctrl-C at the start, in a save and in an evaluation: 130, and how to go on."""
    place, name = INTERRUPTED[where]
    work = getattr(place, name)

    def interrupted(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return work(*given, **named)

    flags = demo.flags("given", "--method", "openclip", "--train-num-samples", "32")
    flags += ["--name=a name", "--epochs", "1", "--resume", "latest", "--workers", "0"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        assert main(["train", *flags]) == 130
    signal.signal(signal.SIGINT, before)
    message = " ".join(capsys.readouterr().err.split())
    assert f"stopped by Ctrl-C {where.strip()}" in message
    command = shlex.split(message.partition("to continue: ")[2])
    assert command[0] == "neuclip"
    assert command[-4:] == ["--name", "a name", "--resume", "auto"]
    assert command.count("--name") == command.count("--resume") == 1
    assert main(command[1:]) == 0
    records = read_records(demo.logs / "a name" / "metrics.jsonl")
    assert {(r["kind"], r["step"]) for r in records} == {("train", 1), ("eval", 2)}


def test_a_killed_judging_is_made_up_for(demo, whole):
    """The checkpoint of an epoch is there, its judging is not: the resumed run judges first."""
    folder = demo.logs / "whole"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 20 or "train" in line]
    (folder / "metrics.jsonl").write_text("".join(kept))
    before = comparable(folder)
    assert main(["train", *demo.flags("whole", *NEUCLIP, "--resume", "latest")]) == 0
    added = comparable(folder)[len(before) :]
    assert [(r["kind"], r["step"], r["split"]) for r in added] == [
        ("eval", 20, split) for split in DEVELOPMENT
    ]


def test_micro_batches_train_on_the_same_samples_and_can_be_cut_anew(demo, whole):
    """A step of 4 x 4 pairs is one of 16: records, schedules, and what a resume asks for."""
    quiet = ("--val-frequency", "0", "--save-frequency", "1", *NEUCLIP)
    cut = ("--batch-size", "4", "--accum-freq", "4", "--stop-epochs", "1")
    assert main(["train", *demo.flags("cut", *quiet, *cut)]) == 0
    log = (demo.logs / "cut" / "out.log").read_text()
    assert "epochs: 1 of 10 steps; pairs per step: 16 = 4 x 4 micro-batches x 1 process" in log
    again = ("--batch-size", "8", "--accum-freq", "2", "--resume", "latest")
    assert main(["train", *demo.flags("cut", *quiet, *again)]) == 0
    found, expected = (
        [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"]
        for folder in (demo.logs / "cut", whole)
    )
    assert [r["step"] for r in found] == [1, 5, 10, 15, 20]
    for key in ("step", "epoch", "samples_seen", "lr", "gamma", "samples_fingerprint"):
        assert [r[key] for r in found] == [r[key] for r in expected], key
    # BatchNorm sees 4 pairs instead of 16: near, not equal.
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.1)


def test_a_run_keeps_its_pool_whatever_the_default_becomes(demo, monkeypatch, capsys):
    quiet = ("--val-frequency", "0", "--save-frequency", "1")
    assert main(["train", *demo.flags("pool", *quiet, "--stop-epochs", "1")]) == 0
    monkeypatch.setattr(family, "POOL_BATCHES", 3)
    monkeypatch.setattr(family, "FRESH_BATCHES", 2)
    kept = read_yaml(demo.logs / "pool" / "config.yaml")["method"]
    assert (kept["pool_size"], kept["gradient_size"]) == (128 * 16, 32 * 16)
    assert main(["train", *demo.flags("pool", *quiet, "--resume", "latest")]) == 0
    run = load_run(CheckpointChoice(demo.logs / "pool"), "cpu")
    assert isinstance(run.config.method, NeuCLIPPoolSettings)
    assert run.config.method.gradient_size == 32 * 16
    assert run.loss.normalizer.settings.size == 128 * 16
    # What a new run would be: another size.
    assert main(["train", *demo.flags("new", *quiet, "--stop-epochs", "1")]) == 0
    assert read_yaml(demo.logs / "new" / "config.yaml")["method"]["pool_size"] == 3 * 16
    # Its settings are a recipe; the one that no longer fits is named.
    recipe = str(demo.logs / "pool" / "config.yaml")
    assert main(["train", "--config", recipe, "--name", "again", "--gradient", "detached"]) == 2
    assert "gradient_size 512 has no effect with gradient 'detached'" in (
        capsys.readouterr().err.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--method", "rgcl_batch"), "has method 'neuclip', this run has 'rgcl_batch'"),
        (("--batch-size", "20"), "has global_batch_size 16, this run has 20"),
        (("--seed", "4"), "has seed 3, this run has 4"),
        (("--shuffle-window", "1"), "has order_of_data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(demo, whole, capsys, change, message):
    path = str(whole / "checkpoints" / "epoch_1.pt")
    flags = demo.flags("other", "--resume", path)
    assert main(["train", *flags, *([] if "--method" in change else NEUCLIP), *change]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_checkpoint_of_another_model_is_refused(demo, whole, capsys):
    path = whole / "checkpoints" / "epoch_1.pt"
    content = storage.load(path)
    content["state_dict"].pop("visual.conv1.weight")
    storage.save(demo.logs / "broken.pt", content)
    flags = demo.flags("other", *NEUCLIP, "--resume", str(demo.logs / "broken.pt"))
    assert main(["train", *flags]) == 2
    assert "another architecture" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(demo, whole, capsys):
    latest = whole / "checkpoints" / "epoch_latest.pt"
    content = latest.read_bytes()
    latest.unlink()
    latest.write_bytes(content[: len(content) // 2])
    assert main(["train", *demo.flags("whole", *NEUCLIP, "--resume", "latest")]) == 2
    error = capsys.readouterr().err
    assert "damaged or incomplete" in error
    assert "epoch_1.pt" in error


def test_resume_latest_of_nothing_begins(demo, capsys):
    flags = demo.flags("fresh", *NEUCLIP, "--epochs", "1", "--resume", "latest", "--workers", "0")
    assert main(["train", *flags]) == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_auto_leaves_out_a_damaged_checkpoint(demo, whole, capsys, monkeypatch):
    """One flipped bit in the newest: the one before continues, and the run ends the same.

    Each file is hashed once, and only the one that continues is loaded.
    """
    before = tensors(storage.load(whole / "checkpoints" / "epoch_2.pt"))
    wanted = {path: value.clone() if torch.is_tensor(value) else value for path, value in before}
    for name in ("epoch_2.pt", "epoch_latest.pt"):
        path = whole / "checkpoints" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    capsys.readouterr()
    hashed, loaded = [], []
    digest, load = hashlib.file_digest, torch.load

    def loading(path, mmap=False, **named):
        if not mmap:  # with it, only the step is read
            loaded.append(Path(path.name).name)
        return load(path, mmap=mmap, **named)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda f, *a: hashed.append(f.name) or digest(f, *a))
        patch.setattr(torch, "load", loading)
        assert main(["train", *demo.flags("whole", *NEUCLIP, "--resume", "auto")]) == 0
    assert [Path(name).name for name in hashed[-1:]] == ["iter_18.pt"]
    assert sorted(Path(name).name for name in hashed) == [
        "epoch_2.pt", "epoch_latest.pt", "iter_18.pt",
    ]  # fmt: skip
    assert loaded == ["iter_18.pt"]
    said = capsys.readouterr().err
    assert said.count("left out: checkpoint") == 2
    assert "iter_18.pt at step 18" in said
    found = dict(tensors(storage.load(whole / "checkpoints" / "epoch_2.pt")))
    for path, value in wanted.items():
        if path not in {"/name", "/neuclip/config"}:
            same = torch.equal(value, found[path]) if torch.is_tensor(value) else True
            assert same, path


def test_auto_of_nothing_begins(demo):
    flags = demo.flags("fresh", "--method", "rgcl_batch", "--epochs", "1", "--resume", "auto")
    assert main(["train", *flags, "--val-frequency", "0", "--workers", "0"]) == 0


def test_stopped_in_a_warm_start_and_continued(demo, monkeypatch, capsys):
    """Rho is being measured and the pool fills: bit by bit the run that nothing stopped."""
    flags = demo.flags("warm", "--rho", "auto", "--warm-start-steps", "12", "--epochs", "1")
    assert main(["train", *flags[:-1], "1", "--name", "straight"]) == 0
    straight = demo.logs / "straight"
    assert "warm start done: 12 batches of 16 pairs" in (straight / "out.log").read_text()
    work, calls = DevicePrefetcher.next_step, []

    def signalled(*given):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*given)

    with monkeypatch.context() as patch:
        patch.setattr(DevicePrefetcher, "next_step", signalled)
        assert main(["train", *flags]) == 75
    assert "after batch 7 of the warm start, which is saved" in " ".join(
        capsys.readouterr().err.split()
    )
    saved = storage.load(demo.logs / "warm/checkpoints/iter_0.pt")["neuclip"]
    assert (saved["step"], saved["warm_steps"]) == (0, 7)
    assert main(["train", *flags, "--resume", "auto"]) == 0
    assert_same_checkpoint(
        straight / "checkpoints/epoch_1.pt", demo.logs / "warm/checkpoints/epoch_1.pt"
    )
    assert comparable(demo.logs / "warm") == comparable(straight)
    found = [(r["kind"], r["step"], r.get("warm_step")) for r in comparable(straight)]
    assert found[:4] == [
        ("warm_start", 0, 1), ("warm_start", 0, 5), ("warm_start", 0, 10), ("train", 1, None),
    ]  # fmt: skip
