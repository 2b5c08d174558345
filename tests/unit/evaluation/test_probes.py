"""Probes on sets: which data they train on, what is counted, and their metrics against loops."""

import json
import random
import statistics

import pytest
import torch
from PIL import Image

from datacomp_sets import CodedTowers, write_classification, write_suite
from neuclip.config.data_sections import DataConfig, ReadingConfig
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.evaluation.class_draws import draw_shots
from neuclip.evaluation.datacomp.sets import open_tasks
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.evaluate import evaluate, evaluate_sets
from neuclip.evaluation.held_out import hold_out
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.nearest_neighbours import NeighbourVotes
from neuclip.evaluation.probe_samples import check_training_data, why_no_probes
from neuclip.evaluation.probes import Probes, ProbeSettings
from neuclip.evaluation.split_layouts import PROBE_TRAINING, PROBED
from neuclip.evaluation.splits import open_split

READING = ReadingConfig(label_key="kind")
SETTINGS = EvaluationSettings(batch_size=8, workers=0)
KNN = ProbeSettings(kinds=("knn",), neighbours=3)
BOTH = ProbeSettings(kinds=("linear", "knn"), neighbours=3)
HUES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120,) * 3}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of pictures in noisy colors, with a label each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name, labels, spell=lambda label: label, seed=0):
        numbers, rows = random.Random(f"{name} {seed}"), ["file,kind"]
        for place, label in enumerate(labels):
            color = tuple(
                max(0, min(255, part + numbers.randint(-60, 60)))
                for part in HUES.get(label, (90, 160, 90))
            )
            Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}{place}.png")
            rows.append(f"{name}{place}.png,{spell(label)}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
        return tmp_path / f"{name}.csv"

    return write


def run(encoder, split, probe, *training, settings=SETTINGS):
    check_training_data(split, training)
    probes = Probes(encoder, settings, probe, training)
    return evaluate(EvaluatedModel(encoder), split, settings, probes=probes).metrics


def opened(path, purpose=PROBED, reading=READING):
    return open_split(path, reading=reading, purpose=purpose)


def features(encoder, path):
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    images = [encoder.transform(Image.open(path.parent / name)) for name, _ in rows]
    return encoder.encode_image(torch.stack(images)), [label for _, label in rows]


def test_metrics_and_counts(table, encoder, log):
    log.set_level("INFO", "neuclip")
    training = table("t", ["red", "green", "blue"] * 7 + ["", "violet", "violet"])
    evaluated = table("v", ["red", "green", "blue", "grey"] * 5)
    split = opened(evaluated)
    probe = ProbeSettings(kinds=("linear", "knn"), neighbours=3, few_shot=(2, 9), few_shot_seeds=3)
    metrics = run(encoder, split, probe, opened(training, PROBE_TRAINING))
    samples, labels = features(encoder, training)
    queries, wanted = features(encoder, evaluated)
    names = split.classnames
    assert names == ["blue", "green", "grey", "red"]
    kept = [row for row, label in enumerate(labels) if label in names]
    classes = torch.tensor([names.index(labels[row]) for row in kept])
    target = torch.tensor([names.index(label) for label in wanted])

    def accuracy(rows):
        votes = NeighbourVotes(samples[kept][rows], classes[rows], 4, 3)(queries)
        return float((votes.argmax(dim=1) == target).double().mean())

    assert metrics["knn_acc1"] == pytest.approx(accuracy(torch.arange(len(kept))))
    drawn = [accuracy(draw_shots(classes, 2, seed)) for seed in range(3)]
    assert metrics["knn_2shot_acc1"] == pytest.approx(statistics.fmean(drawn))
    assert metrics["knn_2shot_acc1_std"] == pytest.approx(statistics.stdev(drawn))
    assert metrics["knn_9shot_acc1"] == metrics["knn_acc1"]
    assert metrics["knn_9shot_acc1_std"] == 0
    # Grey has no training sample: right are at most three of four.
    assert 0.5 < metrics["linear_probe_acc1"] <= 0.75
    assert metrics["linear_probe_mean_per_class_recall"] == metrics["linear_probe_acc1"]
    assert metrics["linear_probe_converged"] == 1 and metrics["linear_probe_strength"] > 0
    assert {"linear_probe_2shot_acc1", "linear_probe_2shot_mean_per_class_recall_std"} <= {*metrics}
    counts = {"num_probe_samples": 21, "num_probe_unlabelled": 1, "num_probe_other_classes": 2}
    assert {key: metrics[key] for key in counts} == counts
    assert metrics["num_untrained"] == 5
    assert "acc1" in metrics and metrics["main_metric"] == metrics["acc1"]
    for text in (
        "probes train on 21 samples of 3 classes, 7 to 7 a class; left out: 2 of classes that are "
        "not evaluated, 1 without a label",
        "3 of 3 classes have fewer than 9 samples; all of them are taken",
        "5 of 20 evaluated samples are of 1 class without a training sample (grey) and count",
        "held-out samples (",
    ):
        assert text in log.text
    assert metrics == run(encoder, split, probe, opened(training, PROBE_TRAINING))


def test_one_sample_of_each_class(table, encoder, log):
    """Nothing can be held out, and fewer samples than neighbours vote."""
    log.set_level("INFO", "neuclip")
    training = opened(table("t", ["red", "green", "blue"]), PROBE_TRAINING)
    metrics = run(
        encoder, opened(table("v", ["red", "green", "blue"] * 4)),
        ProbeSettings(kinds=("linear", "knn")), training,
    )  # fmt: skip
    assert metrics["linear_probe_strength"] == 0.1 and metrics["linear_probe_acc1"] > 0.5
    assert metrics["knn_k"] == 3
    assert "strength 0.1: no class has two samples to hold out one" in log.text
    assert "k 3, all samples, fewer than 20" in log.text


def test_labels_that_are_numbers_need_no_names(table, encoder, log):
    """There is no zero-shot accuracy; 1.0 of a table with gaps is the number 1."""
    numbers = {"red": "2", "green": "10", "blue": "0"}
    evaluated = opened(table("v", [*numbers] * 4, numbers.get))
    assert (evaluated.classnames, evaluated.templates) == (["0", "2", "10"], [])
    with_gaps = table("t", [*numbers] * 5, lambda label: numbers[label] + ".0")
    metrics = run(encoder, evaluated, KNN, opened(with_gaps, PROBE_TRAINING))
    assert metrics["knn_acc1"] > 0.6
    assert "acc1" not in metrics and "main_metric" not in metrics
    assert "no zero-shot accuracy by --label-key kind: the labels are numbers" in log.text


def test_numbers_count_the_names_of_the_evaluated_classes(table, encoder, write_split):
    samples = [(f"{n}", HUES[label], "", n % 3) for n, label in enumerate(["red", "green"] * 3)]
    folder = write_split(table("v", ["red"]).parent / "s", samples, ["a", "b", "c"], ["{c}"])
    training = opened(table("t", ["red", "green", "blue"] * 3, ["red", "green", "blue"].index),
                      PROBE_TRAINING)  # fmt: skip
    assert run(encoder, opened(folder), KNN, training)["num_probe_samples"] == 9
    beyond = opened(table("u", ["red", "green"], {"red": "0", "green": "3"}.get), PROBE_TRAINING)
    with pytest.raises(UserError, match="label 3 has no name among 3 lines"):
        run(encoder, opened(folder), KNN, beyond)


def test_class_folders_and_their_training_part(table, tmp_path, encoder):
    """Of a folder with train and val, each side reads its own, also under WordNet ids."""
    for part, count in (("train", 4), ("val", 2)):
        for number, label in enumerate(("red", "green")):
            place = tmp_path / "photos" / part / f"n0000000{number}"
            place.mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (8, 8), HUES[label]).save(place / f"{image}.png")
    evaluated = opened(tmp_path / "photos", reading=None)
    training = opened(tmp_path / "photos", PROBE_TRAINING, reading=None)
    assert (len(evaluated.index), len(training.index)) == (4, 8)
    metrics = run(encoder, evaluated, KNN, training)
    assert metrics["knn_acc1"] == 1 and "acc1" not in metrics


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red"] * 4, "two classes at least, and all 4 samples of t.csv are of class 'red'"),
        (["violet", "pink"], r"none of its 2 classes \(pink, violet, ...\) is among"),
    ],
)
def test_training_data_that_cannot_be_used(table, encoder, labels, message):
    split = opened(table("v", ["red", "green"]))
    with pytest.raises(UserError, match=message):
        run(encoder, split, KNN, opened(table("t", labels), PROBE_TRAINING))


def test_training_data_need_labels(table):
    path = table("t", ["red"])
    with pytest.raises(UserError, match="has no labels to train probes on: name their column"):
        opened(path, PROBE_TRAINING, reading=None)


def test_evaluated_samples_are_never_trained_on(table, encoder, tmp_path):
    path = table("v", ["red", "green", "blue"] * 3)
    with pytest.raises(UserError, match=r"trained on samples that are evaluated: .*v0\.png is in"):
        run(encoder, opened(path), KNN, opened(path, PROBE_TRAINING))
    reading = DataConfig(label_key="kind")  # labels that only name classes
    held = hold_out(open_source(str(path), reading, captions="optional"), reading, 0.4, 0)
    split = held.probed_split
    assert len(split.training.index) + len(split.index) == 9
    assert "knn_acc1" in run(encoder, split, KNN)
    with pytest.raises(UserError, match="samples that are evaluated"):
        run(encoder, split, KNN, opened(path, PROBE_TRAINING))


def test_a_folder_inside_the_other_is_refused(table, encoder, tmp_path):
    for place in ("all/red", "all/green", "all/val/red", "all/val/green"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), HUES[place.split("/")[-1]]).save(tmp_path / place / "0.png")
    for one, other in (("all", "all/val"), ("all/val", "all"), ("all/val", "all/val")):
        training = opened(tmp_path / one, PROBE_TRAINING, reading=None)
        with pytest.raises(UserError, match="samples that are evaluated"):
            run(encoder, opened(tmp_path / other, reading=None), KNN, training)


def test_corrupt_training_samples(table, encoder, tmp_path):
    path = table("t", ["red", "green", "blue"] * 3)
    (tmp_path / "t4.png").write_bytes(b"no image")
    split = opened(table("v", ["red", "green", "blue"]))
    with pytest.raises(UserError, match=r"training data of probes, t\.csv: an evaluation set must"):
        run(encoder, split, KNN, opened(path, PROBE_TRAINING))
    settings = EvaluationSettings(batch_size=8, workers=0, allow_damage=True)
    metrics = run(encoder, split, KNN, opened(path, PROBE_TRAINING), settings=settings)
    assert (metrics["num_probe_samples"], metrics["num_probe_damaged"]) == (8, 1)


def with_training(folder):
    """A set of clip-benchmark: shards in `train/` beside those in `test/`."""
    rows = [((label, 5, 6), label, None) for label in (0, 1, 2) for _ in range(4)]
    write_classification(folder.parent / "other", rows, 3)
    (folder.parent / "other" / "test").rename(folder / "train")


def test_the_training_part_of_published_sets(tmp_path):
    """Of the suite and of one's own; the test part is never trained on."""
    rows = [((label, 7, 8), label, None) for label in (0, 1, 2, 2)]
    folder = write_classification(tmp_path / "wds_mnist_test", rows, 3)
    assert opened(folder, reading=None).training is None
    assert "train/ beside test/" in why_no_probes(opened(folder, reading=None), ())
    with_training(folder)
    split = opened(folder, reading=None)
    [task_set] = open_tasks(tmp_path, load_suite().select(["mnist"]), training=True)
    assert open_tasks(tmp_path, load_suite().select(["mnist"]))[0].training is None
    for data in (split, task_set):
        assert {file.parent.name for file in data.training.index.files()} == {"train"}
        assert {file.parent.name for file in data.index.files()} == {"test"}
        metrics = run(CodedTowers(), data, BOTH)
        assert metrics["knn_acc1"] == metrics["linear_probe_acc1"] == 1
        assert metrics["num_probe_samples"] == 12


def test_results_of_the_suite_are_reused_with_equal_probes(tmp_path):
    keys = ["mnist", "flowers", "fmow", "flickr_1k_test_image_text_retrieval"]
    write_suite(tmp_path, keys=keys)
    with_training(tmp_path / "wds_vtab-flowers_test")
    sets = open_tasks(tmp_path, load_suite().select(keys), training=True)
    towers, out = CodedTowers(), tmp_path / "results.jsonl"

    def again(probe):
        before = towers.images_seen
        probes = None if probe is None else Probes(towers, SETTINGS, probe)
        model = EvaluatedModel(towers)
        done = {
            each.data.key: each for each in evaluate_sets(model, sets, SETTINGS, out, "c", probes)
        }
        return done, towers.images_seen - before

    done, seen = again(None)
    assert seen == sum(len(data.index) for data in sets)
    done, seen = again(KNN)
    assert [key for key, each in done.items() if not each.reused] == ["vtab/flowers"]
    assert seen == 14 + 12
    metrics = done["vtab/flowers"].result.metrics
    assert "knn_mean_per_class_recall" in metrics
    assert again(KNN)[1] == again(None)[1] == 0
    assert again(None)[0]["vtab/flowers"].result.metrics == metrics
    assert again(BOTH)[1] == 14 + 12
    lines = {line["key"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert "linear held_out 0.2; knn k 3" in lines["vtab/flowers"]["probe"]["settings"]
    assert "probe" not in lines["mnist"]


def test_groups_are_measured_as_in_zero_shot(tmp_path):
    write_suite(tmp_path, keys=["fmow"])
    with_training(tmp_path / "wds_wilds-fmow_test")
    [data] = open_tasks(tmp_path, load_suite().select(["fmow"]), training=True)
    metrics = run(CodedTowers(), data, KNN)
    regions = [value for key, value in metrics.items() if key.startswith("knn_acc_region:")]
    assert metrics["knn_acc_worst_region"] == min(regions)
