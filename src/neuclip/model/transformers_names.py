"""transformers' `CLIPModel` and open_clip's towers: names, layouts and configurations, both ways.

Both compute the same function if the image tower is a plain ViT and the text tower is OpenAI's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.errors import UserError, printable

LAYER_NORM_EPS = 1e-5  # torch's default, which open_clip keeps
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
_VOCABULARY = 49408

_PARTS = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # so spelt in transformers
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}
_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


def clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names, without the logit bias, which `CLIPModel` lacks."""
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "logit_bias":
            continue
        plain = name.removeprefix("text.")
        start, theirs = next(part for part in _PARTS if plain.startswith(part[0]))
        rest = plain.removeprefix(start)
        if not theirs.endswith("layers."):
            moved = value.T if theirs in _TRANSPOSED else value
            converted[theirs + rest] = moved.contiguous()
            continue
        number, _, inner = rest.partition(".")
        module, _, kind = inner.rpartition(".")
        if module == "attn":  # in_proj_weight or in_proj_bias: queries, keys and values in one
            kind = kind.removeprefix("in_proj_")
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{theirs}{number}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            converted[f"{theirs}{number}.{_IN_BLOCK[module]}.{kind}"] = value.contiguous()
    return converted


def is_transformers_clip(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a model of transformers with two towers."""
    return any(name.startswith("vision_model.") for name in weights)


def open_clip_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` by open_clip's names; the inverse of `clip_weights`.

    Args:
        weights: by transformers' names.
        path: their file, for messages.

    Raises:
        CheckpointError: they are of another model of transformers.
    """
    converted: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if name.endswith("position_ids"):
            continue
        part = next((part for part in _PARTS if name.startswith(part[1])), None)
        if part is None:
            raise CheckpointError(f"{path}: {name} is not a weight of CLIPModel; {_OTHER}")
        rest = name.removeprefix(part[1])
        if not part[1].endswith("layers."):
            converted[part[0] + rest] = value.T if part[1] in _TRANSPOSED else value
            continue
        number, _, inner = rest.partition(".")
        third = _QKV.fullmatch(inner)
        module, _, kind = inner.rpartition(".")
        ours = next((ours for ours, theirs in _IN_BLOCK.items() if theirs == module), None)
        if third is not None:
            whole = f"{part[0]}{number}.attn.in_proj_{third[2]}"
            thirds.setdefault(whole, {})[third[1]] = value
        elif ours is not None:
            converted[f"{part[0]}{number}.{ours}.{kind}"] = value
        else:
            raise CheckpointError(f"{path}: {name} is not a weight of CLIPModel; {_OTHER}")
    for name, found in thirds.items():
        if len(found) < 3:
            raise CheckpointError(f"{path}: queries, keys or values are missing for {name}")
        converted[name] = torch.cat([found[letter] for letter in "qkv"])
    if "visual.proj" not in converted:
        raise CheckpointError(f"{path} has no visual_projection; {_OTHER}")
    return converted


_OTHER = (
    "of transformers' models CLIPModel and SiglipModel are read. For others, take open_clip's own "
    "repository of the weights, such as timm/ViT-B-16-SigLIP2 on the hub"
)


def architecture_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of the `CLIPModel` that `config.json` describes.

    Args:
        config: content of `config.json`; what it leaves out has transformers' default.
        where: the file, for messages.

    Raises:
        UserError: it describes another model, one that open_clip does not compute, or holds values
            of other types than transformers writes.
    """
    try:
        return _open_clip_config(config, where)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where} is not as transformers writes it ({printable(str(error))})"
        ) from None


def _open_clip_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """See `architecture_of`; values of other types raise what Python raises for them."""
    kind = config.get("model_type")
    if kind != "clip":
        raise UserError(f"{where} describes transformers' model {kind!r}; {_OTHER}")
    vision, text = dict(config.get("vision_config") or {}), dict(config.get("text_config") or {})
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    exact = {part.get("layer_norm_eps", LAYER_NORM_EPS) for part in (vision, text)}
    if exact != {LAYER_NORM_EPS} or activations not in ({"gelu"}, {"quick_gelu"}):
        raise UserError(
            f"{where}: open_clip computes no such towers (activations {sorted(activations)}, "
            f"layer_norm_eps {sorted(exact)})"
        )
    words = text.get("vocab_size", _VOCABULARY)
    if words != _VOCABULARY:
        raise UserError(f"{where}: its tokenizer is not OpenAI's ({words} tokens)")
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision.get("num_hidden_layers", 12),
            "width": width,
            "head_width": width // vision.get("num_attention_heads", 12),
            "mlp_ratio": vision.get("intermediate_size", 3072) / width,
            "patch_size": vision.get("patch_size", 32),
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": words,
            "width": text_width,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": text.get("intermediate_size", 2048) / text_width,
        },
    }


def preprocessing_of(processor: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's preprocessing from the content of `preprocessor_config.json`."""
    by_number = {number: name for name, number in RESAMPLE.items()}
    resample = processor.get("resample", 3)
    return {
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "interpolation": by_number.get(resample) if isinstance(resample, int) else None,
        "resize_mode": "shortest" if processor.get("do_center_crop", True) else "squash",
    }
