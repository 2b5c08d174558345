"""Training through the command line, from shards to a report."""

import io
import json
import re
import shutil
import tarfile

import open_clip
import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_run
from neuclip.run_folder import read_records

from .conftest import DEVELOPMENT

PUBLISHED = (
    "--save-frequency 1 --train-data DATA --train-num-samples 96 --data_size 19270000 --warmup 5 "
    "--batch-size 16 --epochs 1 --workers 1 --model glyph-tiny --name neuclip --seed 2026 --wd 0.2 "
    "--local-loss --fastclip --multiply_tau --temperature_scheme global_learnable --temperature "
    "0.07 --lr 5e-4 --lr_tau 6.25e-5 --lr_tau_scheduler step_thresh --rho 11.0 --fastclip_eps 1e-6 "
    "--gamma 0.42 --gamma_schedule cosine --gamma_decay_epochs 24 --npn --npn_lr 1.0 "
    "--npn_num_protos 4096 --npn_repetition 10 --npn_restart_iter 500"
)


def test_the_run_folder(demo):
    assert main(["train", *demo.flags("run", "--method", "rgcl_batch")]) == 0
    folder = demo.logs / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.yaml", "data_report.json", "eval_results", "metrics.jsonl",
        "out.log",
    ]  # fmt: skip
    records = read_records(folder / "metrics.jsonl")
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == [1, 5, 10, 15, 20]
    first = records[0]
    assert first["temperature"] == pytest.approx(0.07, rel=1e-2)
    assert first["samples_seen"] == 16
    shares = {key: value for key, value in first.items() if key.startswith("share_")}
    assert {"share_data", "share_encode", "share_normalizer", "share_backward"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [(r["split"], r["epoch"]) for r in evaluations] == [
        (split, epoch) for epoch in (1.0, 2.0) for split in DEVELOPMENT
    ]
    metrics = evaluations[-1]["metrics"]
    assert {"acc1", "mean_per_class_recall", "text_retrieval_recall@1", "chance"} <= metrics.keys()
    lines = (folder / "eval_results/epoch_2_eval_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(DEVELOPMENT)
    assert json.loads(lines[1])["metrics"] == metrics
    assert json.loads((folder / "data_report.json").read_text())["total"] == 0


def test_the_same_seed_gives_the_same_weights_and_another_does_not(demo):
    weights = []
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        flags = demo.flags(name, "--epochs", "1", "--workers", "0", "--seed", seed)
        assert main(["train", *flags, "--val-frequency", "0"]) == 0
        weights.append(storage.load(demo.logs / name / "checkpoints/epoch_1.pt")["state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["visual.conv1.weight"], weights[2]["visual.conv1.weight"])


def test_open_clip_loads_the_checkpoint(demo):
    flags = ["--epochs", "1", "--val-frequency", "0"]
    assert main(["train", *demo.flags("run", *flags, model="glyph-tiny")]) == 0
    path = demo.logs / "run" / "checkpoints" / "epoch_1.pt"
    model, _, _ = open_clip.create_model_and_transforms("glyph-tiny", pretrained=str(path))
    restored = load_run(CheckpointChoice(demo.logs / "run"))
    tokens = open_clip.get_tokenizer("glyph-tiny")(["latin small letter a"])
    with torch.no_grad():
        ours, theirs = restored.encoder.encode_text(tokens), model.eval().encode_text(tokens, True)
    assert torch.equal(ours, theirs)
    assert restored.checkpoint.epoch == 1


def test_methods_side_by_side(demo, tmp_path, capsys):
    runs = []
    methods = ("neuclip_pool", "neuclip", "fastclip_v2", "siglip")
    for method in methods:
        flags = demo.flags(method, "--method", method, "--epochs", "1")
        assert main(["train", *flags]) == 0
        runs.append(str(demo.logs / method))
    assert main(["report", *runs, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(method in page for method in methods)
    log = capsys.readouterr().err
    # In one epoch these equal the plain batch, and say so once; neuclip_pool uses its memory.
    notes = [line for line in log.splitlines() if "the batch's own normalizers" in line]
    without = {"siglip", "neuclip_pool"}
    for method in methods:
        named = [note for note in notes if re.search(rf"\b{method} (uses|averages)", note)]
        assert len(named) == int(method not in without), method


def test_the_published_line_trains(demo, capsys):
    words = [str(demo.data / "train") if w == "DATA" else w for w in PUBLISHED.split()]
    assert main(["train", *words, "--logs", str(demo.logs)]) == 0
    log = capsys.readouterr().err
    assert "--local-loss" in log
    assert "--data-size is not needed" in log
    assert storage.load(demo.logs / "neuclip/checkpoints/epoch_1.pt")["neuclip"]["step"] == 6


def test_eval_of_a_run(demo, capsys):
    assert main(["train", *demo.flags("run", "--val-frequency", "0")]) == 0
    split = str(demo.data / "unseen_face_test")
    capsys.readouterr()
    assert main(["eval", str(demo.logs / "run"), "--epoch", "1", "--val-data", split]) == 0
    assert "top-1" in capsys.readouterr().out
    written = demo.logs / "run/eval_results/epoch_1_eval_results.jsonl"
    (line,) = written.read_text().splitlines()
    metrics = json.loads(line)["metrics"]
    assert metrics["normalizer_mse"] >= 0
    assert metrics["minibatch_normalizer_mse"] >= 0
    assert main(["eval", str(demo.logs / "run"), "--epoch", "7", "--val-data", split]) == 2
    assert "epoch_7.pt" in capsys.readouterr().err


def test_a_diverging_run_stops_with_advice(demo, capsys):
    flags = demo.flags("run", "--lr", "1e30", "--warmup", "0", "--workers", "0")
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "step 2: image_features: 16 of 16 rows are not finite" in error
    assert "Lower --lr" in error
    listed = demo.logs / "run" / "nonfinite_step_2_rank_0.json"
    assert len(json.loads(listed.read_text())["keys"]) == 16


def test_non_finite_steps_can_be_skipped(demo, capsys):
    flags = demo.flags("run", "--lr", "1e30", "--warmup", "0", "--workers", "0", "--epochs", "1")
    assert main(["train", *flags, "--max-nonfinite-steps", "100", "--val-frequency", "0"]) == 0
    assert "skipped step 2: image_features: 16 of 16 rows are not finite" in capsys.readouterr().err
    records = read_records(demo.logs / "run" / "metrics.jsonl")
    assert records[-1]["skipped_steps"] > 0


def test_mistakes_are_named_before_the_first_batch(demo, capsys):
    def error(*flags):
        assert main(["train", *flags]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "--train-data is missing" in error("--name", "x")
    assert "less than one global batch" in error(*demo.flags("x", "--batch-size", "5000"))
    assert "unknown model" in error(*demo.flags("x", "--model", "ViT-B32"))
    assert "nowhere: no such file or folder" in error(*demo.flags("x", "--val-data", "nowhere"))
    assert not (demo.logs / "x").exists()


def test_corrupt_samples_are_counted_and_listed(demo, tmp_path, capsys):
    """One broken image and one empty caption: the run continues and reports them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    source = demo.data / "train" / "00000.tar"
    with tarfile.open(source) as old, tarfile.open(folder / "00000.tar", "w") as new:
        for number, member in enumerate(old):
            content = old.extractfile(member).read()
            if number == 0:
                broken = member.name
            if member.name == broken or number in {4, 5}:
                content = b"" if member.name.endswith(".txt") else content[: len(content) // 2]
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    flags = demo.flags("run", "--train-data", str(folder), "--epochs", "1", "--workers", "0")
    assert main(["train", *flags, "--max-bad-fraction", "0.2"]) == 0
    report = json.loads((demo.logs / "run" / "data_report.json").read_text())
    assert report["total"] >= 1
    assert "corrupt: " in capsys.readouterr().err
    assert main(["train", *flags, "--name", "strict", "--max-bad-fraction", "0"]) == 2
    assert "00000.tar" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fastclip_v2"])
def test_the_demo_of_another_method(method, tmp_path, capsys):
    """The golden curves train the demo recipe of every method."""
    assert main(["demo", "--method", method, "--smoke", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "evaluating" in printed and "unseen_face_test" in printed
    assert (tmp_path / "runs" / f"demo-{method}" / "report.html").exists()
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_low_precision_trains(demo, precision):
    flags = demo.flags("run", "--epochs", "1", "--precision", precision, "--workers", "0")
    split = str(demo.data / "unseen_character_development")
    assert main(["train", *flags, "--val-data", split]) == 0
    losses = [r["loss"] for r in read_records(demo.logs / "run/metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]
    weights = storage.load(demo.logs / "run/checkpoints/epoch_1.pt")["state_dict"]
    kept = torch.bfloat16 if precision == "bf16" else torch.float32
    assert weights["text_projection"].dtype == kept
    assert weights["logit_scale"].dtype == torch.float32
