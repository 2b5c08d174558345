"""Weights by name, from a local server with the hub's routes; open_clip downloads from it too."""

import io
import json
import logging
import time
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip import pretrained as tags
from safetensors.torch import save

from hub_server import COMMIT, Fake, serving
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.export.transformers_clip import clip_config
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import build_clip
from neuclip.model.encoder import Encoder
from neuclip.model.export_info import vocabulary
from neuclip.model.load import load_pretrained
from neuclip.model.opened_checkpoint import open_checkpoint
from neuclip.model.starting_weights import read_starting_weights, with_model_of_weights
from neuclip.model.transformers_names import clip_weights
from tiny_models import CPU, VIT, pairs, tiny
from tiny_siglip import CONFIG, NAME, TOWER, register

SQUASH = {
    "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear",
    "resize_mode": "squash",
}  # fmt: skip
REPOSITORY = "org/tiny"
HUB = f"hf-hub:{REPOSITORY}"
TAG, OTHER = "tiny_s1", "tiny_s2"


@pytest.fixture(scope="module")
def weights():
    return {name: value.clone() for name, value in tiny(seed=1).towers.state_dict().items()}


def as_bytes(weights):
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


@pytest.fixture
def hub(weights, set_hub, monkeypatch):
    """A hub with one repository, whose weights have a tag; another tag names a file of another."""
    known = {TAG: {"hf_hub": f"{REPOSITORY}/", **SQUASH, "quick_gelu": True}}
    known[OTHER] = {"hf_hub": "org/second/epoch_1.pt", "url": "https://example.org/epoch_1.pt"}
    monkeypatch.setitem(tags._PRETRAINED, VIT, known)
    fake = Fake()
    tree = {"model_cfg": open_clip.get_model_config(VIT), "preprocess_cfg": SQUASH}
    fake.files[REPOSITORY] = {
        "README.md": b"not needed",
        "open_clip_config.json": json.dumps(tree).encode(),
        "open_clip_model.safetensors": save(weights),
        "open_clip_pytorch_model.bin": as_bytes(weights),
    }
    fake.files["org/second"] = {"epoch_1.pt": as_bytes({"state_dict": weights})}
    with serving(fake):
        set_hub("ENDPOINT", fake.address)
        yield fake


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "neuclip")
    return caplog


def start(**settings):
    """The towers as a run has them before its first step."""
    starting = read_starting_weights(ModelConfig(**settings))
    torch.manual_seed(5)
    clip = build_clip(starting.architecture(), "fp32", CPU)
    starting.load(clip)
    return clip


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def as_transformers(weights):
    """The files of a CLIPModel with these weights."""
    clip = tiny()
    config = clip_config(dict(clip.architecture.config), weights, vocabulary(clip))
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(clip_weights(weights)),
    }


def form(kind, hub, weights, folder):
    """A form of the same weights: the settings here, and open_clip's arguments."""
    plain, files = write(folder / "plain", hub.files["org/second"]), hub.files[REPOSITORY]
    file = f"{plain}/epoch_1.pt"
    if kind == "transformers":
        files = as_transformers(weights)
        return {"name": f"local-dir:{write(folder / 't', files)}"}, (VIT, file)
    if kind == "transformers on the hub":
        hub.files["org/theirs"] = as_transformers(weights)
        return {"name": "hf-hub:org/theirs"}, (VIT, file)
    if kind == "TorchScript":
        return {"name": VIT, "pretrained": torchscript(folder)}, (VIT, file)
    local = f"local-dir:{write(folder / 'r', files)}"
    return {
        "tag": ({"name": VIT, "pretrained": TAG}, (VIT, TAG)),
        "tag of a file": ({"name": VIT, "pretrained": OTHER}, (VIT, OTHER)),
        "hub": ({"name": HUB}, (HUB, None)),
        "hub as weights": ({"name": VIT, "pretrained": HUB}, (HUB, None)),
        "file": ({"name": VIT, "pretrained": file}, (VIT, file)),
        "repository": ({"name": local}, (local, None)),
    }[kind]


def torchscript(folder):
    clip = tiny(seed=1)
    clip.towers.eval().output_dict = False
    traced = torch.jit.trace(clip.towers, pairs(2), check_trace=False)
    torch.jit.save(traced, str(folder / "ViT.pt"))
    return str(folder / "ViT.pt")


FORMS = [
    "tag", "tag of a file", "hub", "hub as weights", "file", "repository", "transformers",
    "transformers on the hub", "TorchScript",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize("kind", FORMS)
def test_starting_weights_embed_as_open_clip_does(kind, hub, weights, tmp_path):
    """Bit by bit, before the first step, whatever form the weights were given in."""
    settings, (name, pretrained) = form(kind, hub, weights, tmp_path)
    for size, length in ((None, None), ((64, 48), 30)):
        given = {"force_image_size": size, "force_context_length": length}
        clip = start(**given, **settings)
        theirs = open_clip.create_model(name, pretrained, **given).eval()
        images = torch.randn(3, 3, *(size or (32, 32)))
        tokens = clip.tokenize(["a cat", "two dogs", "x " * 40])
        assert tokens.shape == (3, length or 24)
        encoder = Encoder(clip, CPU)
        with torch.no_grad():
            ours = encoder.encode_image(images), encoder.encode_text(tokens)
            expected = theirs.encode_image(images, True), theirs.encode_text(tokens, True)
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(clip.towers.logit_scale, theirs.logit_scale)


def test_a_download_is_announced_and_made_once(hub, said):
    clip = start(name=VIT, pretrained=TAG)
    assert clip.architecture.preprocessing == SQUASH
    line = next(text for text in said.messages if text.startswith("downloading"))
    assert "open_clip_model.safetensors of org/tiny (" in line
    assert "initial weights: tiny_s1" in said.messages
    assert f"(3 MB) from {hub.address}, kept in " in line
    assert hub.got() == ["open_clip_model.safetensors"]
    said.clear()
    start(name=VIT, pretrained=TAG)
    assert hub.got() == ["open_clip_model.safetensors"] and "downloading" not in said.text


def test_weights_without_safetensors(hub):
    del hub.files[REPOSITORY]["open_clip_model.safetensors"]
    start(name=VIT, pretrained=TAG)
    assert hub.got() == ["open_clip_pytorch_model.bin"]


@pytest.mark.parametrize("name", [TAG, HUB])
def test_offline_with_and_without_the_file(name, hub, set_hub):
    set_hub("HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set; unset it .*hf download org/tiny"):
        start(name=VIT, pretrained=name)
    assert not hub.requests
    set_hub("HF_HUB_OFFLINE", False)
    start(name=VIT, pretrained=name)
    set_hub("HF_HUB_OFFLINE", True)
    hub.requests.clear()
    start(name=VIT, pretrained=name)
    assert not hub.requests


def test_a_hub_that_is_not_there(hub, set_hub, said, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    set_hub("ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"from http://127\.0\.0\.1:9: .*refused.*hf download org"):
        start(name=HUB)
    set_hub("ENDPOINT", hub.address)
    start(name=HUB)
    set_hub("ENDPOINT", "http://127.0.0.1:9")
    start(name=HUB)
    assert "org/tiny: the hub does not answer; taking the cache's copy" in said.text


def test_a_busy_hub(hub):
    hub.status = 503
    with pytest.raises(UserError, match=r"HTTP 503; run the command again.*hf download org/tiny"):
        start(name=HUB)


@pytest.mark.parametrize("status", [404, 401])
def test_what_the_hub_does_not_have(hub, status):
    hub.unknown = status
    with pytest.raises(UserError, match=r"org/none: no such repository, or it is private.*HF_TOK"):
        start(name="hf-hub:org/none")
    hub.files["org/second"] = {"README.md": b""}
    with pytest.raises(UserError, match=r"--pretrained tiny_s2: org/second on the hub has no epoc"):
        start(name=VIT, pretrained=OTHER)
    with pytest.raises(
        UserError, match=r"hf-hub:org/second has neither open_clip_config\.json nor"
    ):
        start(name="hf-hub:org/second")
    with pytest.raises(UserError, match="Repo id must"):
        start(name="hf-hub:a/b/c")


def test_a_broken_transfer_is_tried_again(hub):
    hub.cut_after = [1000]
    start(name=VIT, pretrained=TAG)
    assert hub.got() == ["open_clip_model.safetensors"] * 2


def test_a_damaged_file_is_removed(hub, tmp_path):
    content = hub.files[REPOSITORY]["open_clip_model.safetensors"]
    hub.listed_as["open_clip_model.safetensors"] = content[:-1] + b"x"
    with pytest.raises(UserError, match=r"arrived damaged \(its SHA-256 is not [0-9a-f]{64}\)"):
        start(name=VIT, pretrained=TAG)
    assert not [path for path in tmp_path.rglob("*") if path.stat().st_size >= len(content)]


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = Fake(files=hub.files)
    with serving(other):
        hub.elsewhere = other.address
        start(name=VIT, pretrained=TAG)
    assert hub.tokens == {"Bearer hf_secret"} and other.requests and other.tokens == {None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "tiny-resnet", "pretrained": TAG}, "has no published weights tiny_s1, or of any"),
        (
            {"name": VIT, "pretrained": "openai"},
            r"weights openai, but tiny_s2, .*exists for .*ViT-B-32",
        ),
        ({"name": VIT, "pretrained": "tiny_s3"}, "weights of tiny-vit have the tags tiny_s"),
        (
            {"name": "tiny-resnet", "pretrained": HUB},
            r"weights of hf-hub:org/tiny: give --model hf",
        ),
    ],
)
def test_weights_of_another_model(settings, words, hub):
    with pytest.raises(UserError, match=words):
        start(**settings)


def test_a_tag_chooses_its_only_model(hub, monkeypatch):
    assert open_checkpoint(CheckpointChoice(Path(TAG))).arch == VIT
    for given, chosen in ((TAG, VIT), (f"{VIT}:{OTHER}", VIT), (HUB, HUB), ("no_tag", "ViT-B-32")):
        assert with_model_of_weights(ModelConfig(pretrained=given)).name == chosen
    asked = ModelConfig(name="tiny-resnet", pretrained=TAG)
    assert with_model_of_weights(asked) == asked
    monkeypatch.setitem(tags._PRETRAINED, "tiny-resnet", {TAG: {"hf_hub": "org/tiny/"}})
    several = (
        r"tiny_s1 is a tag of 2 models.*: tiny-vit, tiny-resnet: say which, .* tiny-vit:tiny_s1"
    )
    for act in (with_model_of_weights, lambda c: open_checkpoint(CheckpointChoice(Path(TAG)))):
        with pytest.raises(UserError, match=several):
            act(ModelConfig(pretrained=TAG))


def test_model_and_tag_in_one_name(hub):
    clip = start(**with_model_of_weights(ModelConfig(pretrained=f"{VIT}:{TAG}")).model_dump())
    assert clip.name == VIT and clip.architecture.preprocessing == SQUASH
    assert load_pretrained(CheckpointChoice(Path(f"{VIT}:{TAG}")), "cpu").checkpoint.arch == VIT
    with pytest.raises(UserError, match="tiny-vit has no published weights tiny_s9, but tiny_s"):
        start(name=VIT, pretrained=f"{VIT}:tiny_s9")
    with pytest.raises(UserError, match="names the model tiny-vit, and --model names tiny-resnet"):
        start(name="tiny-resnet", pretrained=f"{VIT}:{TAG}")


def test_a_revision_of_a_repository(hub, set_hub):
    hub.revisions = {"main", "v1"}
    start(name=f"{HUB}@v1")
    assert {path.partition("/resolve/")[2].partition("/")[0] for _, path in hub.requests} == {"v1"}
    set_hub("HF_HUB_OFFLINE", True)
    start(name=f"{HUB}@v1")
    with pytest.raises(UserError, match=r"`hf download org/tiny --revision v2 --local-dir DIR`"):
        start(name=f"{HUB}@v2")
    set_hub("HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"org/tiny: no branch, tag or commit v2 of org/tiny"):
        start(name=f"{HUB}@v2")
    with pytest.raises(UserError, match=r"org/tiny@: a branch, tag or commit .* follows @"):
        start(name=f"{HUB}@")


def test_a_file_of_the_name_is_meant_first(hub, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights, TAG)
    start(name=VIT, pretrained=TAG)
    assert not hub.requests


def test_published_weights_are_evaluated_and_exported_as_any(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_pretrained(CheckpointChoice(Path(TAG), arch=VIT), "cpu")
    named = load_pretrained(CheckpointChoice(Path(HUB)), "cpu")
    assert found.sha256 == named.sha256
    assert (found.checkpoint.arch, named.checkpoint.arch) == (VIT, HUB)
    assert str(found.checkpoint.results) == "eval_results/tiny-vit--tiny_s1_eval_results.jsonl"
    assert str(named.checkpoint.results) == "eval_results/org--tiny_eval_results.jsonl"
    with pytest.raises(UserError, match=r"hf-hub:org/tiny is a repository with one model.*--epoch"):
        open_checkpoint(CheckpointChoice(Path(HUB), epoch=1))
    assert COMMIT not in str(named.checkpoint.results)


def test_an_activation_that_the_weights_do_not_want(hub, said):
    start(name=VIT, pretrained=TAG)
    assert "trained with QuickGELU, and tiny-vit computes GELU" in said.text
    said.clear()
    clip = start(name=VIT, pretrained=TAG, force_quick_gelu=True)
    assert "GELU" not in said.text and clip.architecture.quick_gelu
    start(name=HUB, force_quick_gelu=True)
    assert "with GELU, and tiny computes QuickGELU, which harms embeddings; leave out" in said.text
    theirs = open_clip.create_model(VIT, TAG, force_quick_gelu=True).eval()
    images, _ = pairs(2)
    with torch.no_grad():
        expected = theirs.encode_image(images, True)
    assert torch.equal(Encoder(clip, CPU).encode_image(images), expected)


def test_an_image_tower_of_timm_starts_from_its_weights(hub, monkeypatch):
    """As in open_clip: the image tower has timm's weights, the text tower its random ones."""
    words = {k: v for k, v in CONFIG["text_cfg"].items() if not k.startswith(("hf_", "tokenizer"))}
    register(monkeypatch)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, {**CONFIG, "text_cfg": words})
    published = timm.models.PretrainedCfg(hf_hub_id="timm/tower", num_classes=0, classifier=None)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, TOWER, published)
    torch.manual_seed(1)
    weights = timm.create_model(TOWER, num_classes=0).state_dict()
    hub.files["timm/tower"] = {"model.safetensors": save(weights)}
    settings = ModelConfig(name=NAME, pretrained_image=True, force_image_size=48)
    starting = read_starting_weights(settings)
    assert starting.begins_trained == (True, False)
    asked = len(hub.requests)
    found = []
    for _ in "ab":
        torch.manual_seed(5)
        found.append(build_clip(starting.architecture(), "fp32", CPU, pretrained_image=True))
    assert len(hub.requests) == asked  # it builds from the cache
    torch.manual_seed(5)
    theirs = open_clip.create_model(NAME, pretrained_image=True, force_image_size=48)
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[0].towers.state_dict()[name], value), name
    ours = found[0].towers.state_dict()
    assert torch.equal(ours["visual.trunk.norm.weight"], weights["norm.weight"])
    block = "blocks.1.mlp.fc1.weight"
    assert torch.equal(ours[f"visual.trunk.{block}"], weights[block])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": VIT}, "the image tower of tiny-vit is not one of timm's.*--pretrained TAG"),
        ({"name": NAME}, f"timm has no weights of {TOWER} on the hub"),
    ],
)
def test_image_towers_without_weights_of_their_own(settings, words, monkeypatch):
    register(monkeypatch)
    with pytest.raises(UserError, match=words):
        read_starting_weights(ModelConfig(**settings, pretrained_image=True))
    with pytest.raises(UserError, match="--pretrained-image and --pretrained both give weights"):
        ModelConfig(pretrained_image=True, pretrained="x").check()
