"""`neuclip eval --probe`: what it prints, writes, shows in the report, and refuses."""

import json
import random

import pytest
import torch
from PIL import Image

from datacomp_sets import picture, write_classification
from neuclip.cli.app import main
from tiny_models import VIT, tiny

COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A model in a run folder, and pictures of three colors in folders for training and tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    numbers = random.Random(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, color in COLORS.items():
            place = tmp_path / "photos" / part / label
            place.mkdir(parents=True)
            for image in range(count):
                shade = tuple(part + numbers.randint(-30, 30) for part in color)
                Image.new("RGB", (8, 8), shade).save(place / f"{image}.png")
    folder = tmp_path / "logs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("method:\n  name: openclip\n")
    content = {"epoch": 2, "name": "run", "state_dict": tiny().towers.state_dict()}
    torch.save(content, folder / "checkpoints" / "epoch_2.pt")
    return tmp_path


def run(*flags):
    fixed = ("--epoch", "2", "--arch", VIT, "--device", "cpu", "--workers", "0")
    return main(["eval", "logs/run", *fixed, *map(str, flags)])


def test_probes_are_printed_written_and_reported(data, capsys):
    flags = ("--val-data", "photos", "--probe", "knn,linear", "--probe-data", "photos")
    assert run(*flags, "--few-shot", "1,2", "--few-shot-seeds", 2, "--knn-k", 4) == 0
    told = capsys.readouterr()
    assert "photos: probes train on 18 samples of 3 classes, 6 to 6 a class" in told.err
    assert "photos: k-NN: k 4" in told.err and "photos: linear probe: strength " in told.err
    [line] = (data / "logs/run/eval_results/epoch_2_eval_results.jsonl").read_text().splitlines()
    result = json.loads(line)
    metrics = result["metrics"]
    assert metrics["num_probe_samples"] == 18
    assert metrics["linear_probe_acc1"] > 0.6 and 0 <= metrics["knn_2shot_acc1_std"] <= 1
    settings = "seed 0; linear held_out 0.2; knn k 4 temperature 0.07; few_shot 1,2 seeds 2"
    assert result["probe"]["settings"] == settings
    rows = {row[:47].strip(): row[47:].strip() for row in told.out.splitlines()}
    assert rows["Linear probe top-1"] == f"{100 * metrics['linear_probe_acc1']:.2f} %"
    assert rows["k-NN top-1, 2 per class"] == f"{100 * metrics['knn_2shot_acc1']:.2f} %"
    assert main(["report", "logs/run", "--out", "page.html"]) == 0
    page = (data / "page.html").read_text()
    assert "Linear probe top-1" in page and "k-NN top-1, 2 per class" in page
    # A later evaluation without probes says that it replaces them.
    capsys.readouterr()
    assert run("--val-data", "photos") == 0
    assert "photos: its results of probes are replaced" in capsys.readouterr().err


def test_a_suite_with_and_without_training_parts(data, capsys):
    rows = [((label, 7, 8), label, None) for label in (0, 1, 2, 2)]
    for folder in ("wds_mnist_test", "wds_vtab-flowers_test", "other"):
        write_classification(data / "sets" / folder, rows, 3)
    (data / "sets/other/test").rename(data / "sets/wds_vtab-flowers_test/train")
    flags = ("--data-dir", "sets", "--tasks", "mnist,flowers", "--probe", "knn")
    assert run(*flags, "--knn-k", 1) == 0
    told = capsys.readouterr()
    assert "no probes on MNIST: it has no training part (the folder train/ beside test/" in told.err
    [head, row] = told.out.partition("\n\n")[2].splitlines()[:2]
    assert head.split() == ["task", "metric", "samples", "k-NN"]
    assert "mean_per_class_recall" in row and row.split()[-2:] == ["4", "1.0000"]
    assert run(*flags[:2], "--tasks", "mnist", "--probe", "knn") == 2
    assert "--probe knn: nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probe-data", "photos"), "--probe-data needs --probe linear, --probe knn or both"),
        (("--few-shot", "2"), "--few-shot needs --probe"),
        (("--probe", "svm"), "--probe svm: expected linear, knn or linear,knn"),
        (("--probe", "knn", "--few-shot", "0,2"), "--few-shot 0,2: expected numbers of samples"),
        (("--probe", "knn", "--few-shot-seeds", 5), "--few-shot-seeds needs --few-shot"),
        (("--probe", "linear", "--val-proportion", 1), "--val-proportion: 1 is out of range"),
        (("--probe", "knn", "--knn-k", 0), "--knn-k: 0 is out of range"),
        (("--probe", "knn"), "no probes on photos: it has no training part"),
        (("--probe", "knn", "--probe-data", "nowhere"), "nowhere: no such file or folder"),
        (("--probe", "knn", "--probe-data", "pictures"), "pictures has no labels to train probes"),
        (("--probe", "knn", "--probe-data", "photos/val"), "samples that are evaluated"),
    ],
)
def test_flags_that_do_not_fit(data, capsys, flags, message):
    (data / "pictures").mkdir()
    (data / "pictures" / "a.png").write_bytes(picture((1, 2, 3)))
    assert run("--val-data", "photos", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("photos/train", "samples that are evaluated"),
        ("places", "none of its 2 classes (lake, wood, ...) is among those"),
    ],
)
def test_training_data_that_cannot_be_used_are_found_before_the_model_is_read(
    data, capsys, training, message
):
    """Also if only the second set shows it, and with the checkpoint missing."""
    for label in ("lake", "wood"):
        (data / "places" / label).mkdir(parents=True)
        (data / "places" / label / "a.png").write_bytes(picture((1, 2, 3)))
    flags = ("--val-data", "photos/val::photos/train", "--probe", "knn", "--probe-data", training)
    assert run(*flags, "--epoch", "7") == 2
    told = capsys.readouterr()
    assert message in " ".join(told.err.split()) and "evaluating" not in told.out
    assert not (data / "logs/run/eval_results").exists()
