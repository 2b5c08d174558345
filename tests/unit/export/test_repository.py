import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from neuclip.cli.app import main
from neuclip.config.resolve import resolve
from neuclip.config.sections import ModelConfig
from neuclip.config.validation import validate
from neuclip.evaluation.results import write_eval_result
from neuclip.export import repository
from neuclip.export.exported_files import record_of
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import build_clip
from neuclip.model.load import load_pretrained
from neuclip.run_folder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture
def make_run(tmp_path):
    """A run folder with a checkpoint of an untrained model, as the trainer writes it."""

    def make(bias=False, **more):
        torch.manual_seed(3)
        clip = build_clip("glyph-tiny", "fp32", CPU, {"logit_bias": -7.0} if bias else {})
        config = validate(
            {
                "name": "mine",
                "model": {"name": "glyph-tiny"},
                "data": {"train_data": "/home/somebody/shards::/data/other/{0..9}.tar"},
            },
            "test",
        )
        own = {"config": resolve(config, 1).to_yaml(), "step": 40, "steps_per_epoch": 20}
        own |= {"global_batch_size": 64, "num_samples": 1300}
        own["damage"] = {"total": 3, "by_kind": {"image": 3}, "by_shard": {}, "examples": []}
        content = {"epoch": 2, "name": "mine", "state_dict": clip.towers.state_dict()}
        run = tmp_path / "mine"
        (run / "checkpoints").mkdir(parents=True)
        whole = {**content, "neuclip": own, **more}
        for name in ("epoch_2.pt", "epoch_latest.pt"):
            torch.save(whole, run / "checkpoints" / name)
        return run

    return make


def features(model, pictures, tokens):
    model.eval()
    with torch.no_grad():
        return model.encode_image(pictures), model.encode_text(tokens)


def own_features(run, pictures, texts, **choice):
    clip = load_pretrained(CheckpointChoice(run, **choice), "cpu").clip
    return features(clip.towers, pictures, clip.tokenize(texts))


def usage_of(printed):
    """The code that the command printed."""
    return "import open_clip" + printed.partition("import open_clip")[2]


def loaded_as_printed(code, folder, monkeypatch):
    """Runs the printed code in the folder it speaks of, with open_clip's own list of models."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    open_clip.factory._MODEL_CONFIGS.pop("glyph-tiny", None)
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("form", ["open_clip", "safetensors", "hf"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_open_clip_gives_identical_embeddings(
    make_run, tmp_path, pictures, texts, form, bias, capsys, monkeypatch
):
    run, out = make_run(bias), tmp_path / "out"
    assert main(["export", str(run), "--format", form, "--out", str(out)]) == 0
    expected = own_features(run, pictures, texts)
    names = loaded_as_printed(usage_of(capsys.readouterr().out), tmp_path, monkeypatch)
    found = features(names["model"], pictures, names["tokenizer"](texts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if bias:
        assert names["model"].logit_bias == -7.0


def test_a_repository_is_evaluated_and_exported_again_unchanged(make_repository, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    main(["export", str(make_repository()), "--format", "hf", "--out", str(first)])
    main(["export", str(first), "--format", "hf", "--out", str(second)])
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    configs = [json.loads((f / "open_clip_config.json").read_text()) for f in (first, second)]
    assert configs[0] == configs[1]
    assert configs[0]["preprocess_cfg"]["mean"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize("form", ["open_clip", "safetensors", "hf"])
@pytest.mark.parametrize("flags", [[], ["--force-image-size", "16", "24"]], ids=["", "resized"])
def test_a_repository_keeps_its_preprocessing(
    make_repository, tmp_path, texts, form, flags, capsys, monkeypatch
):
    repository, out = make_repository(), tmp_path / "out"
    assert main(["export", str(repository), "--format", form, "--out", str(out), *flags]) == 0
    changes = ModelConfig(force_image_size=(16, 24) if flags else None)
    clip = load_pretrained(CheckpointChoice(repository, changes=changes), "cpu").clip
    code = usage_of(capsys.readouterr().out).partition("# or, the same towers")[0]
    names = loaded_as_printed(code, tmp_path, monkeypatch)
    shown = [
        str(each).replace("[", "(").replace("]", ")")
        for each in (names["preprocess"], clip.eval_transform)
    ]
    assert shown[0] == shown[1]
    assert "0.4, 0.5, 0.6" in str(clip.eval_transform)
    image = Image.effect_noise((40, 30), 100).convert("RGB")
    pictures = torch.stack([names["preprocess"](image)])
    assert pictures.shape[2:] == ((16, 24) if flags else (32, 32))
    found = features(names["model"], pictures, names["tokenizer"](texts))
    expected = features(clip.towers, pictures, clip.tokenize(texts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_architecture_without_counterpart_is_named(make_run, tmp_path, capsys):
    assert main(["export", str(make_run()), "--format", "hf", "--out", str(tmp_path / "o")]) == 0
    said = "no files for transformers: its image tower is a ResNet, CLIPModel has a ViT"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o" / "config.json").exists()
    assert said in (tmp_path / "o" / "README.md").read_text()


def test_a_bias_is_no_part_of_clip_model(make_repository, tmp_path, capsys):
    repository = make_repository(init_logit_bias=-3.5)
    assert main(["export", str(repository), "--format", "hf", "--out", str(tmp_path / "o")]) == 0
    assert "CLIPModel has no logit bias: add -3." in capsys.readouterr().err
    assert "logit_bias" not in load_file(tmp_path / "o" / "model.safetensors")


def test_the_moving_average(make_run, tmp_path, pictures, texts, capsys):
    run = make_run()
    path = run / "checkpoints" / "epoch_2.pt"
    content = torch.load(path)
    torch.save(content | {"ema_state_dict": averaged(content["state_dict"])}, path)
    flags = ["--epoch", "2", "--format", "safetensors", "--out", str(tmp_path / "o")]
    assert main(["export", str(run), *flags]) == 0
    assert ", moving average of the weights)" in capsys.readouterr().out
    found = load_file(tmp_path / "o" / "open_clip_model.safetensors")
    expected = averaged(content["state_dict"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    plain = own_features(run, pictures, texts, epoch=2, ema=False)
    average = own_features(run, pictures, texts, epoch=2)
    assert not torch.equal(plain[0], average[0])
    assert main(["export", str(run), *flags, "--no-ema", "--overwrite"]) == 0
    assert "moving average" not in capsys.readouterr().out
    found = load_file(tmp_path / "o" / "open_clip_model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in content["state_dict"].items())


def averaged(weights):
    return {
        key: value * 0.5 if value.is_floating_point() else value for key, value in weights.items()
    }


class TestCard:
    def test_recipe_data_and_results(self, make_run, tmp_path):
        run, out = make_run(), tmp_path / "out"
        metrics = {"acc1": 0.25, "mean_recall@1": 0.125, "main_metric": 0.25}
        write_eval_result(RunFolder(run).results(2), "unseen_face_test", metrics)
        main(["export", str(run), "--format", "hf", "--out", str(out), "--license", "mit"])
        card = (out / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front == {
            "library_name": "open_clip",
            "pipeline_tag": "zero-shot-image-classification",
            "license": "mit",
            "tags": ["clip", "neuclip"],
        }
        assert "# mine" in card and "architecture glyph-tiny" in card
        assert "| Samples in the data | 1,300 |" in card
        assert "| Samples in an epoch | 1,280 |" in card
        assert "| Samples seen | 2,560 |" in card and "| Epochs | 2 |" in card
        assert "| Corrupt samples | 3 (3 image) |" in card
        assert "| unseen_face_test | acc1 | 0.2500 |" in card
        assert "| unseen_face_test | mean_recall@1 | 0.1250 |" in card
        settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
        assert settings["data"]["train_data"] == "shards::{0..9}.tar"
        assert settings["method"]["name"] == "neuclip_pool"
        assert "somebody" not in card

    def test_what_is_not_known_is_left_out(self, make_repository, tmp_path):
        main(["export", str(make_repository()), "--out", str(tmp_path / "out")])
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license" not in yaml.safe_load(card.split("---")[1])
        assert "## Recipe" not in card and "## Data" not in card
        assert "has not been evaluated" in card


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--out", "{full}"], "is not empty: choose another folder, or replace"),
        (["--out", "{file}"], "is a file; give a folder"),
        (["--out", "{file}/o"], "cannot write "),
        (["--out", "{new}", "--epoch", "7"], "no checkpoint at"),
        (["--out", "{new}", "--license", "my own"], "is not a licence identifier; examples: mit"),
        (["--out", "{new}", "--arch", "ViT-B-33"], "unknown model 'ViT-B-33'"),
    ],
)
def test_bad_input(make_run, tmp_path, flags, text, capsys):
    run = make_run()
    (tmp_path / "full").mkdir()
    for name in ("full/x", "file"):
        (tmp_path / name).write_text("kept")
    places = {name: str(tmp_path / name) for name in ("full", "file", "new")}
    assert main(["export", str(run), *(flag.format(**places) for flag in flags)]) == 2
    assert text in capsys.readouterr().err
    assert (tmp_path / "full/x").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "mine"]


def test_overwrite_replaces_only_its_own_files(make_run, tmp_path, capsys):
    run, out = make_run(), tmp_path / "out"
    command = ["export", str(run), "--out", str(out)]
    assert main([*command, "--format", "hf"]) == 0
    assert (out / "open_clip_model.safetensors").exists()
    (out / "notes.txt").write_text("kept")
    (out / "open_clip_config.json").write_text("changed since")
    assert main([*command, "--overwrite"]) == 0
    kept = ["README.md", "glyph-tiny.json", "notes.txt"]
    kept += ["open_clip_config.json", "open_clip_model.pt"]
    assert sorted(path.name for path in out.iterdir()) == kept
    assert (out / "open_clip_config.json").read_text() == "changed since"
    capsys.readouterr()
    assert main([*command, "--format", "hf", "--overwrite"]) == 2
    assert "not written by an export, or changed since: open_clip_config" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == kept


@pytest.mark.parametrize("card", [None, "mine", "<!-- written by neuclip export:  -->"])
def test_what_no_export_wrote_is_never_deleted(make_run, tmp_path, capsys, card):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    names = ["config.json", "model.safetensors", "open_clip_model.safetensors", "merges.txt"]
    for name in names:
        (out / name).write_text("mine")
    if card is not None:
        (out / "README.md").write_text(card)
    code = main(["export", str(run), "--out", str(out), "--overwrite"])
    assert code == (2 if card == "mine" else 0)
    assert ("changed since: README.md;" in capsys.readouterr().err) == (card == "mine")
    assert all((out / name).read_text() == "mine" for name in names)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "is neither a run folder" in capsys.readouterr().err


def export_of(folder, **files):
    """A folder as an export of these files leaves it, before and after it gets its name."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    record = record_of(folder)
    (folder / "README.md").write_text(f"# {files}\n<!-- written by neuclip export: {record} -->")
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["replace", "unlink", "rename"])
def test_a_failure_between_the_moves_loses_nothing(tmp_path, monkeypatch, kind):
    """Every move and removal fails in turn; the same call then ends as if nothing had been."""
    old = export_of(tmp_path / "old", weights="1", config="{}", vocabulary="a", merges="m")
    new = export_of(tmp_path / "new", weights="22", config="{}", merges="k", tokens="t")
    original, failed = getattr(Path, kind), 0
    while True:
        for name in ("out", "staging"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "new", tmp_path / "staging")
        if kind != "rename":
            shutil.copytree(tmp_path / "old", tmp_path / "out")
        left = [failed]

        def change(path, *to, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "Input/output error")
            return original(path, *to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, kind, change)
            with suppress(OSError):
                repository._move(tmp_path / "staging", tmp_path / "out")
        if left[0] >= 0:
            break  # every change has failed once
        failed += 1
        if (tmp_path / "out").exists():
            found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
            assert all(text in (old.get(name), new.get(name)) for name, text in found.items())
            assert found["README.md"] == old["README.md"] and found.keys() >= old.keys() & new
        shutil.copytree(tmp_path / "new", tmp_path / "staging", dirs_exist_ok=True)
        repository._move(tmp_path / "staging", tmp_path / "out")
        assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == new
    assert failed == {"replace": 5, "unlink": 1, "rename": 1}[kind]


def test_a_disk_of_its_own_keeps_a_temporary_folder_if_it_must(make_run, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    made = []
    original = tempfile.TemporaryDirectory
    patched = lambda **given: made.append(given["dir"]) or original(**given)  # noqa: E731
    monkeypatch.setattr(tempfile, "TemporaryDirectory", patched)

    def rmdir(path, of=os.rmdir, **more):
        if ".disk-" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        of(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)  # the export is complete by then
    assert main(["export", str(make_run()), "--out", str(tmp_path / "disk")]) == 0
    assert made == [tmp_path / "disk"]
    found = {path.suffix for path in (tmp_path / "disk").iterdir() if path.is_file()}
    assert found == {".json", ".md", ".pt"}
