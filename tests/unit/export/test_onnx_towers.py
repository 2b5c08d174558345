"""ONNX graphs of both towers: equal to torch, whole or not at all."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.export import onnx_towers
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.encoder import Encoder
from neuclip.model.load import load_pretrained

CPU = torch.device("cpu")


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given], [made] = session.get_inputs(), session.get_outputs()
    assert not isinstance(given.shape[0], int)  # the batch is dynamic
    return session.run([made.name], {given.name: inputs.numpy()})[0]


def test_graphs_embed_as_the_towers_do(make_repository, tmp_path, pictures, texts, capsys):
    repository, out = make_repository(), tmp_path / "out"
    assert main(["export", str(repository), "--out", str(out), "--format", "onnx"]) == 0
    printed = capsys.readouterr().out
    clip = load_pretrained(CheckpointChoice(repository), "cpu").clip
    encoder, tokens = Encoder(clip, CPU), clip.tokenize(texts)
    for count in (1, 3):
        images = run(out / "vision_model.onnx", pictures[:count])
        words = run(out / "text_model.onnx", tokens[:count])
        for found, ours in (
            (images, encoder.encode_image(pictures[:count])),
            (words, encoder.encode_text(tokens[:count])),
        ):
            assert np.abs(found - ours.numpy()).max() < 1e-5
            assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    for name in ("vision_model.onnx", "text_model.onnx"):
        graph = onnx.load(out / name, load_external_data=False)
        assert [each.version for each in graph.opset_import if not each.domain] == [18]
    card = (out / "README.md").read_text()
    assert "the L2 norm is inside" in card and "opset 18" in card
    assert f"logits are {clip.logit_scale:.6g} times the cosines" in card
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.4, 0.5, 0.6]

    # The printed code runs, and gives the towers' embeddings of a file.
    code = printed[printed.index("import onnxruntime") :]
    picture = tmp_path / "photo.jpg"
    Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(picture)
    names = {}
    exec(code.replace('"photo.jpg"', repr(str(picture))).replace('"out', f'"{out}'), names)
    expected = encoder.encode_text(clip.tokenize(["a photo of a cat"])).numpy()
    assert np.abs(names["text_embeds"] - expected).max() < 1e-5
    image = encoder.encode_image(clip.eval_transform(Image.open(picture))[None]).numpy()
    assert float((names["image_embeds"] * image).sum()) > 0.999


def test_a_tower_that_does_not_export_leaves_nothing(
    make_repository, tmp_path, monkeypatch, capsys
):
    inner = onnx_towers.write_towers

    def without_operator(module, inputs, output):
        rows = output.flatten(1)
        return torch.linalg.eigvals(rows @ rows.T).real.sum() * 0 + output

    def broken(clip, folder):
        clip.towers.visual.register_forward_hook(without_operator)
        return inner(clip, folder)

    monkeypatch.setattr(onnx_towers, "write_towers", broken)
    out = tmp_path / "out"
    repository = make_repository()
    assert main(["export", str(repository), "--out", str(out), "--format", "onnx"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the image tower does not export" in error
    assert "eig" in error and "nothing was written" in error
    assert [path.name for path in tmp_path.iterdir()] == [repository.name]


def test_a_difference_from_torch_is_an_error(make_repository, tmp_path, monkeypatch):
    clip = load_pretrained(CheckpointChoice(make_repository()), "cpu").clip
    inner = onnx_towers._compare

    def compare(module, graph, path, count):
        clip.towers.visual.proj.data[0] += 0.01
        inner(module, graph, path, count)

    monkeypatch.setattr(onnx_towers, "_compare", compare)
    with pytest.raises(UserError, match=r"of the image tower differ by .* more than 0\.0001"):
        onnx_towers.write_towers(clip, tmp_path)


def test_missing_packages_are_named_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_towers, "_PACKAGES", ("onnx", "no_such_package"))
    line = ["export", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--format", "onnx"]
    assert main(line) == 2
    assert "--format onnx needs no_such_package: install them with pip install 'neuclip[onnx]'" in (
        " ".join(capsys.readouterr().err.split())
    )
