import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import build_clip
from neuclip.model.load import load_pretrained, load_run
from neuclip.model.opened_checkpoint import open_checkpoint
from neuclip.model.starting_weights import read_starting_weights
from neuclip.model.transformers_names import clip_weights
from tiny_models import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return build_clip("glyph-tiny", "fp32", CPU)


@pytest.fixture
def weights(clip):
    return {name: value.clone() for name, value in clip.towers.state_dict().items()}


def features(encoder, clip):
    length = clip.tokenize(["x"]).shape[1]
    tokens = torch.randint(0, 200, (3, length), generator=torch.Generator().manual_seed(0))
    return encoder.encode_text(tokens)


def expected(clip):
    from neuclip.model.encoder import Encoder

    return features(Encoder(clip, CPU), clip)


def test_each_form_of_a_checkpoint_gives_the_same_towers(tmp_path, clip, weights):
    forms = {
        "open_clip.pt": {"epoch": 3, "name": "x", "state_dict": weights},
        "parallel.pt": {"state_dict": {f"module.{name}": v for name, v in weights.items()}},
        "bare.pt": weights,
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    save_file(weights, tmp_path / "plain.safetensors")
    hashes = set()
    for name in [*forms, "plain.safetensors"]:
        found = load_pretrained(CheckpointChoice(tmp_path / name, arch="glyph-tiny"), "cpu")
        assert torch.equal(features(found.encoder, clip), expected(clip)), name
        stem = name.partition(".")[0]
        assert found.checkpoint.results == tmp_path / "eval_results" / f"{stem}_eval_results.jsonl"
        hashes.add(found.sha256)
    assert len(hashes) == 1  # of the weights, not of the file


def test_other_weights_have_another_hash(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pt")
    weights["logit_scale"] += 1e-6
    torch.save(weights, tmp_path / "b.pt")
    one, other = (
        load_pretrained(CheckpointChoice(tmp_path / name, arch="glyph-tiny"), "cpu").sha256
        for name in ("a.pt", "b.pt")
    )
    assert one != other


def test_a_repository_on_disk(tmp_path, clip, weights):
    config = open_clip.get_model_config("glyph-tiny")
    size = config["vision_cfg"]["image_size"]
    preprocess = {"size": size, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    found = load_pretrained(CheckpointChoice(tmp_path), "cpu")
    assert torch.equal(features(found.encoder, clip), expected(clip))
    assert "0.1" in str(found.encoder.transform)  # the repository's own preprocessing
    assert found.checkpoint.results == tmp_path / "eval_results" / "repository_eval_results.jsonl"
    with pytest.raises(UserError, match="leave out --arch"):
        load_pretrained(CheckpointChoice(tmp_path, arch="glyph-tiny"), "cpu")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights: expected open_clip_model\.safetensors"):
        load_pretrained(CheckpointChoice(tmp_path), "cpu")


HUGE = {"width": 2**20, "layers": 4}  # 2^42 numbers a layer: building it would fail


def changed(part, **settings):
    config = open_clip.get_model_config("glyph-tiny")
    return {**config, part: {**config[part], **settings}}


@pytest.mark.parametrize(
    "config",
    [
        changed("vision_cfg", **HUGE),
        changed("text_cfg", **HUGE),
        changed("text_cfg", vocab_size=2**40),
        changed("text_cfg", context_length=2**21),  # a mask of its square
        changed("vision_cfg", image_size=2**24),
        {**open_clip.get_model_config("glyph-tiny"), "embed_dim": 2**40},
    ],
    ids=["image", "text", "words", "length", "pixels", "embedding"],
)
@pytest.mark.parametrize("form", ["repository", "recorded", "starting weights"])
def test_a_model_far_larger_than_its_weights_is_not_built(tmp_path, weights, config, form):
    if form == "recorded":
        record = {"name": "x", "model_cfg": config, "preprocess_cfg": {}, "resized": None}
        content = {"state_dict": weights, "neuclip": {"architecture": record}}
        torch.save(content, tmp_path / "x.pt")
        choice = CheckpointChoice(tmp_path / "x.pt")
    else:
        write_json(tmp_path / "open_clip_config.json", {"model_cfg": config})
        save_file(weights, tmp_path / "open_clip_model.safetensors")
        choice = CheckpointChoice(tmp_path)
    with pytest.raises(UserError, match=r"does not fit .*: the model has [\d,]+ numbers, the file"):
        if form == "starting weights":
            settings = ModelConfig(name=f"local-dir:{tmp_path}")
            read_starting_weights(settings).architecture()
        else:
            load_pretrained(choice, "cpu")


def test_a_transformers_model_far_larger_than_its_weights_is_not_built(tmp_path):
    part = {"hidden_size": 2**20, "num_attention_heads": 2**14, "intermediate_size": 2**22}
    parts = {"text_config": part, "vision_config": part, "projection_dim": 512}
    write_json(tmp_path / "config.json", {"model_type": "clip", **parts})
    save_file(clip_weights(tiny().towers.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit .*: the model has [\d,]+ numbers, the file"):
        load_pretrained(CheckpointChoice(tmp_path), "cpu")


@pytest.mark.parametrize("form", ["recorded", "open_clip", "resnet", "transformers"])
def test_a_model_of_very_many_blocks_is_not_built(tmp_path, weights, form):
    """They take a moment each, even without memory."""
    save_file(weights, tmp_path / "model.safetensors")
    choice, config = CheckpointChoice(tmp_path), changed("text_cfg", layers=2**31)
    if form == "recorded":
        record = {"name": "x", "model_cfg": config, "preprocess_cfg": {}, "resized": None}
        content = {"state_dict": weights, "neuclip": {"architecture": record}}
        torch.save(content, tmp_path / "x.pt")
        choice = CheckpointChoice(tmp_path / "x.pt")
    elif form == "transformers":
        write_json(
            tmp_path / "config.json",
            {"model_type": "clip", "vision_config": {"num_hidden_layers": 2**31}},
        )
    else:
        config = changed("vision_cfg", layers=[3, 9**9, 3, 3]) if form == "resnet" else config
        write_json(tmp_path / "open_clip_config.json", {"model_cfg": config})
    with pytest.raises(UserError, match=r"layers is .*; at most 1,000 are built"):
        load_pretrained(choice, "cpu")


def write_json(path, tree):
    path.write_text(json.dumps(tree))


def test_epochs_steps_and_the_latest(tmp_path, weights):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "params.txt").write_text("model: glyph-tiny\n")
    for name in ("epoch_2.pt", "iter_40.pt", "epoch_latest.pt"):
        torch.save({"epoch": 7, "state_dict": weights}, folder / "checkpoints" / name)
    for choice, name in (
        (CheckpointChoice(folder), "epoch_7"),
        (CheckpointChoice(folder, epoch=2), "epoch_2"),
        (CheckpointChoice(folder, step=40), "iter_40"),
    ):
        found = load_pretrained(choice, "cpu")
        assert found.checkpoint.results == folder / "eval_results" / f"{name}_eval_results.jsonl"
    (folder / "checkpoints" / "epoch_latest.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint at .*epoch_latest.*there are: epoch_2\.pt"):
        load_pretrained(CheckpointChoice(folder), "cpu")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_damaged_file(tmp_path, weights, name):
    (save_file if name == "x.safetensors" else torch.save)(weights, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_pretrained(CheckpointChoice(tmp_path / name, arch="glyph-tiny"), "cpu")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        load_pretrained(CheckpointChoice(tmp_path / "nowhere"), "cpu")


def test_a_missing_file_and_a_choice_that_a_file_does_not_have(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"no checkpoint at .*b\.pt; there are: a\.pt"):
        open_checkpoint(CheckpointChoice(tmp_path / "b.pt"))
    with pytest.raises(UserError, match="--epoch, --iter and --best need a run folder"):
        open_checkpoint(CheckpointChoice(tmp_path / "a.pt", epoch=1))
    with pytest.raises(UserError, match="name several checkpoints"):
        open_checkpoint(CheckpointChoice(tmp_path, epoch=1, step=2))
    with pytest.raises(UserError, match=r"not record its architecture\. .* shapes of glyph-tiny"):
        load_pretrained(CheckpointChoice(tmp_path / "a.pt"), "cpu")
    found = load_run(CheckpointChoice(tmp_path / "a.pt", arch="glyph-tiny"), "cpu")
    assert (found.config, found.loss) == (None, None)


def test_the_average_is_taken_unless_the_weights_are_asked_for(tmp_path, weights):
    average = {name: value + 1 for name, value in weights.items()}
    for name, content in (
        ("averaged.pt", {"state_dict": weights, "ema_state_dict": average}),
        ("plain.pt", {"state_dict": weights}),
    ):
        torch.save(content, tmp_path / name)
    for name, ema, expected, flags, results in (
        ("averaged.pt", True, average, (True, False), "averaged"),
        ("averaged.pt", False, weights, (False, True), "averaged_weights"),
        ("plain.pt", True, weights, (False, False), "plain"),
        ("plain.pt", False, weights, (False, False), "plain"),
    ):
        found = open_checkpoint(CheckpointChoice(tmp_path / name, ema=ema))
        assert all(torch.equal(value, expected[key]) for key, value in found.weights.items())
        assert (found.averaged, found.plain) == flags
        assert found.results.name == f"{results}_eval_results.jsonl"


def test_recorded_settings_are_only_read_when_needed(tmp_path, weights):
    """Weights of a run whose method no longer exists can still be used."""
    own = {"config": "method: {name: forgotten}\nmodel: {name: glyph-tiny}"}
    torch.save({"state_dict": weights, "neuclip": own}, tmp_path / "a.pt")
    found = load_pretrained(CheckpointChoice(tmp_path / "a.pt"), "cpu")
    assert found.checkpoint.arch == "glyph-tiny"
    with pytest.raises(UserError, match="unknown method"):
        found.checkpoint.run_config()


def test_settings_under_an_earlier_name_are_refused_with_a_way_out(tmp_path, weights):
    config = "model: {name: glyph-tiny}\nmethod: {name: neuclip, refresh: fifo}\n"
    content = {"state_dict": weights, "epoch": 1, "name": "x", "neuclip": {"config": config}}
    torch.save(content, tmp_path / "old.pt")
    checkpoint = open_checkpoint(CheckpointChoice(tmp_path / "old.pt"))
    with pytest.raises(UserError, match=r"is neuclip_pool: write(.|\n)*use the version that wrote"):
        checkpoint.run_config()
    assert set(checkpoint.weights) == set(weights)


def test_towers_that_were_trained_with_a_bias(tmp_path):
    towers = build_clip("glyph-tiny", "fp32", CPU, {"logit_bias": -10.0}).towers
    torch.save({"state_dict": towers.state_dict()}, tmp_path / "siglip.pt")
    load_pretrained(CheckpointChoice(tmp_path / "siglip.pt", arch="glyph-tiny"), "cpu")
