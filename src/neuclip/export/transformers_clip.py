"""Converts open_clip's towers to transformers' `CLIPModel`: configuration, weights, tokenizer.

Only towers that compute the same function are converted: plain ViTs for images and OpenAI's
transformer for texts. Any other architecture is refused with the reason.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from neuclip.model.export_info import Vocabulary

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PROCESSOR, _TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
_SPECIAL, _VOCABULARY, _MERGES = "special_tokens_map.json", "vocab.json", "merges.txt"
FILES = (CONFIG, WEIGHTS, _PROCESSOR, _TOKENIZER, _SPECIAL, _VOCABULARY, _MERGES)
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAYER_NORM_EPS = 1e-5  # torch's default, which open_clip keeps
_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers

# Entries of an architecture that CLIPModel supports, or that do not change the function.
_TOP = "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale init_logit_bias"
_VISION = "image_size layers width head_width mlp_ratio patch_size patch_dropout output_tokens"
_TEXT = "context_length vocab_size width heads layers mlp_ratio output_tokens tokenizer_kwargs"
# Other entries are obstacles unless they have the value that CLIPModel uses.
_NEUTRAL: dict[str, object] = {
    "pos_embed_type": "learnable",
    "pad_id": 0,
    "eos_id": 2,
    "proj_type": "linear",
}

_PARTS = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # so spelt in transformers
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj", "visual_projection.weight"),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"text_projection", "text_projection.weight"),
    (r"logit_scale", "logit_scale"),
)
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}


def obstacle(config: dict[str, Any]) -> str | None:
    """The reason why transformers' `CLIPModel` cannot represent an architecture, or none.

    Args:
        config: architecture in the form of open_clip's configuration files.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        return f"its image tower is timm's {vision['timm_model_name']}, CLIPModel has a ViT"
    if isinstance(vision.get("layers"), list):
        return "its image tower is a ResNet, CLIPModel has a ViT"
    if text.get("hf_model_name"):
        return f"its text tower is {text['hf_model_name']}, CLIPModel has OpenAI's transformer"
    if text.get("hf_tokenizer_name"):
        return f"its tokenizer is {text['hf_tokenizer_name']}, CLIPModel's is OpenAI's"
    for key in ("image_size", "patch_size"):
        if isinstance(vision.get(key), list | tuple):
            return f"its {key} is not square, CLIPModel's is"
    pools = {"vision_cfg": "tok", "text_cfg": "argmax"}
    for part, known in (("", _TOP), ("vision_cfg", _VISION), ("text_cfg", _TEXT)):
        section = config[part] if part else config
        neutral = {**_NEUTRAL, "pool_type": pools.get(part)}
        for key, value in section.items():
            if key not in known.split() and value and value != neutral.get(key):
                where = f"{part}.{key}" if part else key
                return f"CLIPModel has no {where} = {value!r}"
    return None


def clip_config(
    config: dict[str, Any], weights: dict[str, Tensor], vocabulary: Vocabulary
) -> dict[str, Any]:
    """`config.json` of a model without `obstacle`.

    Args:
        config: architecture.
        weights: weights by open_clip's names.
        vocabulary: vocabulary of the tokenizer.
    """
    vision, text, embed_dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, text_width = vision.get("width", 768), text.get("width", 512)
    end = len(vocabulary.numbers) - 1
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": _LAYER_NORM_EPS,
        "projection_dim": embed_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": float(weights["logit_scale"]),
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names, without the logit bias, which `CLIPModel` lacks."""
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "logit_bias":
            continue
        plain = name.removeprefix("text.")
        pattern, start = next(part for part in _PARTS if re.match(part[0], plain))
        rest = plain[re.match(pattern, plain).end() :]  # type: ignore[union-attr]
        if not start.endswith("layers."):
            moved = value.T if start in _TRANSPOSED else value
            converted[start + rest] = moved.contiguous()
            continue
        number, _, inner = rest.partition(".")
        module, _, kind = inner.rpartition(".")
        if module == "attn":  # in_proj_weight or in_proj_bias: queries, keys and values in one
            kind = kind.removeprefix("in_proj_")
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{start}{number}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            converted[f"{start}{number}.{_IN_BLOCK[module]}.{kind}"] = value.contiguous()
    return converted


def processor_files(
    preprocessing: dict[str, Any], context_length: int, vocabulary: Vocabulary
) -> dict[str, str]:
    """Content of the files of `CLIPProcessor`, by name."""
    numbers = dict(vocabulary.numbers)
    for token, ours in ((_START, "<start_of_text>"), (_END, "<end_of_text>")):
        numbers[token] = numbers.pop(ours)
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    tokenizer = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
    }
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)])
    return {
        _PROCESSOR: _json(_image_processor(preprocessing)),
        _TOKENIZER: _json(tokenizer),
        _SPECIAL: _json(special),
        _VOCABULARY: json.dumps(numbers, ensure_ascii=False) + "\n",
        _MERGES: merges + "\n",
    }


def _image_processor(preprocessing: dict[str, Any]) -> dict[str, Any]:
    size = preprocessing["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    square = {"height": height, "width": width}
    squash = preprocessing["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": min(height, width)},
        "resample": _RESAMPLE[preprocessing["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Writes text files by name."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
