"""DataComp's suite on small sets of all 38 keys: library, commands, reuse, kill and resume."""

import json
import logging
import os
import re
import shutil

import pytest
import torch

from datacomp_sets import CodedTowers, write_suite
from neuclip.cli.app import main
from neuclip.evaluation.datacomp.sets import open_tasks
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.evaluate import evaluate_sets
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.outcomes import read_outcomes
from neuclip.evaluation.results import read_eval_results
from neuclip.model.clip import build_clip
from neuclip.run_folder import outcomes_path

SUITE = load_suite()
SETTINGS = EvaluationSettings(batch_size=8, workers=0)


def run(towers, sets, checkpoint, out, settings=SETTINGS):
    """The results by key."""
    walk = evaluate_sets(EvaluatedModel(towers), sets, settings, out, checkpoint)
    return {done.data.key: done.result for done in walk}


@pytest.fixture
def log(caplog):
    """What the package logs, whether or not its messages go to the root logger."""
    logger = logging.getLogger("neuclip")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sets, and what each must score."""
    folder = tmp_path_factory.mktemp("datacomp")
    return folder, write_suite(folder)


@pytest.fixture
def run_folder(tmp_path):
    """What open_clip leaves of a run: a checkpoint, and no word on the architecture."""
    folder = tmp_path / "logs" / "name"
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    towers = build_clip("glyph-tiny", "fp32", torch.device("cpu")).towers
    content = {"epoch": 2, "name": "name", "state_dict": towers.state_dict()}
    torch.save(content, folder / "checkpoints" / "epoch_2.pt")
    return folder


def published(run_folder, data_dir, *more):
    """DataComp's own words."""
    return [
        "--train_output_dir", str(run_folder), "--data_dir", str(data_dir), "--epoch", "2",
        "--arch", "glyph-tiny", "--device", "cpu", "--workers", "0", *more,
    ]  # fmt: skip


def results_of(run_folder):
    return run_folder / "eval_results" / "epoch_2_eval_results.jsonl"


def test_all_38_tasks_give_the_known_answers(data, tmp_path):
    data_dir, answers = data
    towers = CodedTowers()
    sets = open_tasks(data_dir, SUITE.select())
    out = tmp_path / "results.jsonl"
    found = run(towers, sets, "c" * 64, out)
    assert found.keys() == answers.keys() == SUITE.tasks.keys()
    for key, answer in answers.items():
        metrics = found[key].metrics
        assert {k: metrics[k] for k in answer} == pytest.approx(answer, abs=1e-7), key
        assert metrics["main_metric"] == metrics[SUITE.tasks[key].metric]
        assert all(type(value) is float for value in metrics.values())
        outcomes = read_outcomes(outcomes_path(out, key))
        assert outcomes.evaluate() == pytest.approx(metrics["main_metric"], abs=1e-6), key
    # One pass: each picture goes through the tower once.
    assert towers.images_seen == sum(len(task_set.index) for task_set in sets)
    main_metrics = [found[key].metrics["main_metric"] for key in answers]
    assert 0.1 < sum(main_metrics) / 38 < 0.9  # sets that any model gets right would prove nothing
    scores = {key: found[key].metrics["main_metric"] for key in answers}
    average = SUITE.average("datacomp", scores)
    assert average.value == pytest.approx(sum(main_metrics) / 38)
    assert (average.done, average.total) == (38, 38)


def test_lines_are_as_datacomp_reads_them(data, tmp_path):
    data_dir, _ = data
    tasks = SUITE.select(["cifar100", "fmow"])
    out = tmp_path / "results.jsonl"
    run(CodedTowers(), open_tasks(data_dir, tasks), "c", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["vtab/cifar100", "wilds/fmow"]
    assert [line["dataset"] for line in lines] == ["CIFAR-100", "FMoW"]
    assert lines[1]["metrics"]["main_metric"] == lines[1]["metrics"]["acc_worst_region"]
    assert lines[0]["provenance"]["suite"] == SUITE.version


def test_class_vectors_of_one_list_are_computed_once(data, tmp_path):
    data_dir, _ = data
    for name in ("wds_imagenet1k_test", "wds_imagenetv2_test"):
        shutil.copytree(data_dir / "wds_imagenet1k_test", tmp_path / "sets" / name)
    towers = CodedTowers()
    sets = open_tasks(tmp_path / "sets", SUITE.select(["imagenet1k", "imagenetv2"]))
    run(towers, sets, "c", tmp_path / "r.jsonl")
    assert towers.texts_seen == 2 * len(sets[0].classnames)  # two templates


class TestReuse:
    @pytest.fixture
    def evaluate(self, data, tmp_path):
        sets = tmp_path / "sets"
        for name in ("wds_cifar10_test", "wds_mnist_test"):
            shutil.copytree(data[0] / name, sets / name)

        def evaluate(checkpoint="c", settings=SETTINGS):
            towers = CodedTowers()
            opened = open_tasks(sets, SUITE.select(["cifar10", "mnist"]))
            run(towers, opened, checkpoint, tmp_path / "r.jsonl", settings)
            return towers.images_seen

        evaluate.sets, evaluate.results = sets, tmp_path / "r.jsonl"
        return evaluate

    def test_nothing_changed(self, evaluate):
        assert evaluate() == 28
        before = evaluate.results.read_bytes()
        assert evaluate() == 0
        assert evaluate.results.read_bytes() == before

    def test_another_checkpoint(self, evaluate):
        evaluate()
        assert evaluate("d") == 28
        assert len(read_eval_results(evaluate.results)) == 2

    def test_other_data(self, evaluate):
        evaluate()
        os.utime(evaluate.sets / "wds_mnist_test" / "test" / "1.tar", (1, 1))
        assert evaluate() == 14
        names = evaluate.sets / "wds_cifar10_test" / "classnames.txt"
        names.write_text(names.read_text().replace("number 0", "the number 0"))
        assert evaluate() == 14

    def test_another_suite(self, evaluate, log):
        evaluate()
        text = evaluate.results.read_text().replace(SUITE.version, "datacomp-38/0", 1)
        evaluate.results.write_text(text)
        assert evaluate() == 14
        assert "result of suite datacomp-38/0 is replaced" in log.text


def test_the_published_command(data, run_folder, capsys):
    data_dir, answers = data
    words = published(run_folder, data_dir)
    assert main(["eval", *words]) == 0
    out = capsys.readouterr().out
    assert "[38/38] WinoGAViL: jaccard_score_10-12" in out
    assert "DataComp average" in out
    assert "mean of 38" in out
    results = results_of(run_folder)
    assert [line.key for line in read_eval_results(results)] == list(answers)
    before = results.read_bytes()
    assert main(["eval", *words]) == 0
    assert capsys.readouterr().out.count("(reused)") == 38
    assert results.read_bytes() == before


def test_tasks_and_groups(data, run_folder, capsys):
    path = run_folder / "checkpoints" / "epoch_2.pt"
    words = [
        "eval",
        str(path),
        "--arch",
        "glyph-tiny",
        "--data-dir",
        str(data[0]),
        "--workers",
        "0",
    ]
    assert main([*words, "--tasks", "mnist", "--groups", "retrieval"]) == 0
    out = capsys.readouterr().out
    keys = [line.key for line in read_eval_results(results_of(run_folder))]
    assert keys == ["mnist", *SUITE.members["retrieval"].tasks]
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "mean of 2" in rows["Retrieval (Flickr + MSCOCO)"]
    assert not rows.keys() & {"DataComp average", "Retrieval (with WinoGAViL)", "VTAB"}
    assert main([*words, "--tasks", "mnist", "--groups", "retrieval", "--partial"]) == 0
    rows = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "mean of 3 of 38" in rows["DataComp average"]


def test_partial_leaves_out_sets_that_are_not_there(data, run_folder, tmp_path, capsys):
    sets = tmp_path / "sets"
    shutil.copytree(data[0] / "wds_mnist_test", sets / "wds_mnist_test")
    words = ["eval", *published(run_folder, sets)]
    assert main(words) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "37 evaluation sets are missing in" in message
    assert "download-evalsets" in message
    assert not results_of(run_folder).exists()
    assert main([*words, "--partial"]) == 0
    captured = capsys.readouterr()
    assert "skipping 37 missing sets: imagenet1k," in captured.err
    assert "mean of 1 of 38" in captured.out


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--epoch", "3"], r"no checkpoint at .*epoch_3.pt; there are: epoch_2.pt"),
        (["--epoch", "-1"], r"no checkpoint at .*epoch_latest.pt; there are: epoch_2.pt"),
        (["--epoch", "-1", "--iter", "7"], r"no checkpoint at .*iter_7.pt"),
        (["--iter", "7"], r"--epoch, --iter and --best name several checkpoints"),
        (
            ["--arch", "ViT-B-32"],
            r"does not fit ViT-B-32: .*These are the shapes of glyph-tiny.*--arch",
        ),
        (["--arch", "ViT-B-33"], r"unknown model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        (["--tasks", "cifar-100"], r"unknown task 'cifar-100'; did you mean 'cifar100'"),
        (["--groups", "imagenets"], r"unknown group 'imagenets'; did you mean 'imagenet'"),
        (["--val-data", "x"], r"--val-data and --data-dir name different data"),
    ],
)
def test_bad_input_of_the_command(data, run_folder, capsys, more, text):
    words = published(run_folder, data[0], "--tasks", "mnist")
    for flag in more[::2]:
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    assert main(["eval", *words, *more]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(text, message), message
    assert not results_of(run_folder).exists()


def test_without_an_architecture(data, run_folder, capsys):
    words = ["eval", str(run_folder), "--epoch", "2", "--data-dir", str(data[0])]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "does not record its architecture. These are the shapes of glyph-tiny" in said
    (run_folder / "params.txt").write_text("logs: ./logs\nmodel: glyph-tiny\nname: name\n")
    assert main([*words, "--tasks", "mnist", "--workers", "0", "--device", "cpu"]) == 0


def test_words_that_need_the_other_data(run_folder, capsys):
    assert main(["eval", "--train_output_dir", str(run_folder)]) == 2
    assert "--train_output_dir needs --data-dir" in capsys.readouterr().err
    assert main(["eval", str(run_folder), "--tasks", "mnist"]) == 2
    assert "--tasks needs --data-dir" in capsys.readouterr().err
    assert main(["eval", "--data-dir", "x"]) == 2
    assert "needs one run folder or checkpoint" in capsys.readouterr().err


def test_own_data_with_a_checkpoint_of_open_clip(data, run_folder, tmp_path, capsys):
    sets = [data[0] / "wds_mnist_test", tmp_path / "a" / "val", tmp_path / "b" / "val"]
    for place in sets[1:]:
        shutil.copytree(data[0] / "wds_mscoco_2014_5k_test_image_text_retrieval_test", place)
    checkpoint = run_folder / "checkpoints" / "epoch_2.pt"
    words = ["eval", "--checkpoint", str(checkpoint), "--model", "glyph-tiny", "--workers", "0"]
    assert main([*words, "--val-data", "::".join(map(str, sets))]) == 0
    out = capsys.readouterr().out
    assert f"evaluating {checkpoint} on wds_mnist_test, a/val, b/val" in out
    lines = {line.key: line for line in read_eval_results(results_of(run_folder))}
    assert list(lines) == ["wds_mnist_test", "a/val", "b/val"]
    assert lines["a/val"].metrics["num_captions"] > lines["a/val"].metrics["num_samples"]
    assert lines["a/val"].data == lines["b/val"].data != lines["wds_mnist_test"].data
    galleries = {path.name for path in (run_folder / "eval_results").glob("gallery_*")}
    assert galleries == {"gallery_a-val.json", "gallery_b-val.json"}
    assert main([*words, "--val-data", f"{tmp_path}/x::{tmp_path}/y"]) == 2
    assert capsys.readouterr().err.count("no such file or folder") == 2
