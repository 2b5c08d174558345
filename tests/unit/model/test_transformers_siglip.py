"""transformers' SiglipModel against our towers, and against open_clip's with the same weights."""

import json

import open_clip
import pytest
import torch

from neuclip.checkpoint.common import CheckpointError
from neuclip.config.sections import ModelConfig
from neuclip.model.architecture import find_architecture
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import build_clip
from neuclip.model.encoder import Encoder
from neuclip.model.foreign_weights import unwrap
from neuclip.model.load import load_pretrained
from neuclip.model.starting_weights import read_starting_weights
from tiny_models import CPU
from tiny_siglip import register

transformers = pytest.importorskip("transformers")

TEXTS = ["A cat!", "two dogs, one cat", "dogs " * 30]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A SiglipModel with its tokenizer, and the sizes among open_clip's models."""
    register(monkeypatch)
    both = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={
            **both, **ends, "intermediate_size": 128, "vocab_size": 40,
            "max_position_embeddings": 16,
        },
        vision_config={**both, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    theirs = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.logit_scale.fill_(2.0)
    theirs.save_pretrained(tmp_path / "siglip")
    transformers.SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "siglip"
    )
    write_tokenizer(tmp_path / "siglip")
    return tmp_path / "siglip"


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "</s>", "a", "cat", "two", "dogs", "one"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def images(*size):
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))


def test_the_same_logits_as_transformers(folder):
    found = load_pretrained(CheckpointChoice(folder), "cpu")
    clip = found.clip
    assert clip.architecture.preprocessing == {
        "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "interpolation": "bicubic",
        "resize_mode": "squash",
    }  # fmt: skip
    tokens = clip.tokenize(TEXTS)
    assert tokens[0].tolist() == [3, 4] + [0] * 14  # lower case, no punctuation, padded
    outputs = clip.towers.eval()(images(32, 32), tokens)
    theirs = transformers.SiglipModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(pixel_values=images(32, 32), input_ids=tokens).logits_per_image
    scale, bias = outputs["logit_scale"], outputs["logit_bias"]
    logits = scale * outputs["image_features"] @ outputs["text_features"].T + bias
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "length"), [(None, None), ((48, 64), 20)])
def test_the_same_embeddings_as_open_clip(folder, tmp_path, size, length):
    """Bit by bit, from a repository of open_clip's with these weights."""
    name = f"local-dir:{folder}"
    starting = read_starting_weights(
        ModelConfig(name=name, force_image_size=size, force_context_length=length)
    )
    torch.manual_seed(5)
    clip = build_clip(starting.architecture(), "fp32", CPU)
    starting.load(clip)
    plain = load_pretrained(CheckpointChoice(folder), "cpu").checkpoint.weights
    config = find_architecture(name).config
    (tmp_path / "theirs").mkdir()
    tree = {"model_cfg": config, "preprocess_cfg": {}}
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps(tree))
    torch.save(dict(plain), tmp_path / "theirs" / "open_clip_pytorch_model.bin")
    theirs = open_clip.create_model(
        f"local-dir:{tmp_path / 'theirs'}", force_image_size=size, force_context_length=length
    ).eval()
    encoder, tokens = Encoder(clip, CPU), clip.tokenize(TEXTS)
    assert tokens.shape == (3, length or 16)
    shown = images(*(size or (32, 32)))
    with torch.no_grad():
        assert torch.equal(encoder.encode_image(shown), theirs.encode_image(shown, True))
        assert torch.equal(encoder.encode_text(tokens), theirs.encode_text(tokens, True))


def test_a_part_that_is_missing(folder):
    weights = transformers.SiglipModel.from_pretrained(folder).state_dict()
    del weights["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(
        CheckpointError, match=r"are missing for .*layers\.1\.self_attn\.in_proj_bias"
    ):
        unwrap(weights, folder)
