"""`--resume CHECKPOINT --epochs 0`: open_clip's command line evaluates without training."""

import json
import shlex

import pytest
import torch

from datacomp_sets import write_classification, write_imagenet
from neuclip.cli.app import main
from neuclip.evaluation.results import EvalResult, Provenance, read_eval_results, write_result
from neuclip.model.clip import build_clip
from neuclip.run_folder import RunFolder
from neuclip.training import evaluation_plan


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet") / "val")


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    prompts = [f"number {n}" for n in range(1000)], ["{c}"]
    monkeypatch.setattr(evaluation_plan, "imagenet_prompts", lambda: prompts)


@pytest.fixture
def foreign(tmp_path):
    """What FastCLIP leaves: weights of wrapped towers, an optimizer, no word on the model."""
    torch.manual_seed(0)
    towers = build_clip("glyph-tiny", "fp32", torch.device("cpu")).towers
    weights = {f"module.{key}": value for key, value in towers.state_dict().items()}
    path = tmp_path / "logs" / "medium" / "checkpoints" / "epoch_37.pt"
    path.parent.mkdir(parents=True)
    content = {"epoch": 37, "name": "medium", "state_dict": weights, "optimizer": {"state": {}}}
    torch.save(content, path)
    return path


def published(checkpoint, imagenet, logs, more=""):
    return shlex.split(
        f"--resume {checkpoint} --zeroshot-frequency 1 --imagenet-val {imagenet} --batch-size 512 "
        f"--epochs 0 --workers 0 --model glyph-tiny --name eval_epoch_37 --seed 2024 "
        f"--logs {logs} --device cpu --eval-samples 100 {more}"
    )


def test_the_published_line(foreign, imagenet, tmp_path, capsys):
    line = published(foreign, imagenet, tmp_path / "logs")
    assert main(["train", *line]) == 0
    said = capsys.readouterr().err
    assert "imagenet-val@100 after epoch 37: acc1 " in said
    assert "on 100 of 1000 samples" in said
    folder = tmp_path / "logs" / "eval_epoch_37"
    (record,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (record["kind"], record["split"], record["epoch"]) == ("eval", "imagenet-val@100", 37)
    (result,) = read_eval_results(RunFolder(folder).results(37))
    assert result.metrics == record["metrics"]
    assert (result.dataset, result.provenance) == ("ImageNet validation", None)
    assert "imagenet_val:" in (folder / "config.yaml").read_text()
    assert not list((folder / "checkpoints").iterdir())


def test_what_the_folder_of_a_run_holds_stays(foreign, imagenet, tmp_path):
    """Judged into the run's own folder: settings, later records, and the benchmark's results."""
    write_classification(tmp_path / "sets/wds_mnist_test", [((1, 2, 3), 1, None)] * 4, 6)
    run = foreign.parent.parent
    (run / "config.yaml").write_text("name: medium\n")
    later = json.dumps({"kind": "eval", "step": 900, "split": "x", "metrics": {}})
    (run / "metrics.jsonl").write_text(later + "\n")
    whole = EvalResult("mnist", "MNIST", {"main_metric": 0.5}, Provenance("s", "c", "d", "fp32"))
    write_result(RunFolder(run).results(37), whole)
    more = f"--eval-tasks mnist --eval-data-dir {tmp_path / 'sets'} --name medium"
    assert main(["train", *published(foreign, imagenet, tmp_path / "logs", more)]) == 0
    assert (run / "config.yaml").read_text() == "name: medium\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["x", "imagenet-val@100", "mnist"]
    results = read_eval_results(RunFolder(run).results(37))
    assert results[0] == whole
    assert [result.key for result in results] == ["mnist", "imagenet-val@100"]


def test_weights_and_evaluation_data_alone_evaluate_as_in_open_clip(
    foreign, imagenet, tmp_path, capsys
):
    """The model comes from the run's own record; nothing says a word about a method."""
    (foreign.parent.parent / "params.txt").write_text("model: glyph-tiny\n")
    line = f"--imagenet-val {imagenet} --eval-samples 100 --workers 0 --device cpu"
    found = []
    for number, weights in enumerate((f"--pretrained {foreign}", f"--resume {foreign} --epochs 0")):
        logs = tmp_path / f"logs{number}"
        assert main(["train", *shlex.split(f"{line} --logs {logs} {weights}")]) == 0
        assert "method" not in capsys.readouterr().err
        (folder,) = logs.iterdir()
        assert folder.name.startswith("eval-epoch_37-")
        assert "name: glyph-tiny" in (folder / "config.yaml").read_text()
        found.append(read_eval_results(RunFolder(folder).results(37)))
    assert found[0] == found[1]


def test_an_architecture_that_nothing_records_is_asked_for(foreign, imagenet, tmp_path, capsys):
    line = f"--pretrained {foreign} --imagenet-val {imagenet} --logs {tmp_path / 'out'}"
    assert main(["train", *shlex.split(line)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "not record its architecture. These are the shapes of glyph-tiny: give --model" in said


def test_weights_without_evaluation_data_need_training_data(foreign, capsys):
    assert main(["train", "--pretrained", str(foreign)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--train-data is missing" in said
    assert "a run only evaluates" in said


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--zeroshot-frequency 0", "no evaluation data is given: add --imagenet-val"),
        ("--imagenet-val missing", "no folder of ImageNet images at missing"),
        ("--model ViT-B-32", "does not fit ViT-B-32: "),
        ("--resume none.pt", "no checkpoint at none.pt"),
        ("--resume auto", "has no checkpoint"),
        ("--eval-tasks mnistt --eval-data-dir .", "unknown task 'mnistt'; did you mean 'mnist'"),
        (
            "--eval-tasks mnist --eval-data-dir missing",
            "the set of mnist is missing at missing: no such folder",
        ),
    ],
)
def test_bad_input(foreign, imagenet, tmp_path, capsys, more, text):
    line = published(foreign, imagenet, tmp_path / "logs")
    flags = dict(zip(line[::2], line[1::2], strict=True))
    flags.update(zip(more.split()[::2], more.split()[1::2], strict=True))
    assert main(["train", *[word for pair in flags.items() for word in pair]]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("logs/eval_epoch_37/*.jsonl"))


def test_a_damaged_picture_is_fatal(foreign, imagenet, tmp_path, capsys):
    picture = imagenet / "n10000070" / "a.png"
    content = picture.read_bytes()
    picture.write_bytes(b"no image")
    try:
        assert main(["train", *published(foreign, imagenet, tmp_path / "logs")]) == 2
    finally:
        picture.write_bytes(content)
    said = " ".join(capsys.readouterr().err.split())
    assert "imagenet-val: an evaluation set must be complete" in said
    assert "n10000070/a" in said
