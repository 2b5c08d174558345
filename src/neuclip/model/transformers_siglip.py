"""transformers' `SiglipModel` and open_clip's towers: names, layouts and configurations.

open_clip computes SigLIP's image tower with timm, whose models have fixed names. The architecture
is therefore looked up among open_clip's own models.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.errors import UserError

MODEL_TYPE = "siglip"
_PROBE = "vision_model.head.probe"
_ACTIVATION = "gelu_pytorch_tanh"

_PARTS = (
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_model.head.", "text.text_projection."),
    ("vision_model.embeddings.patch_embedding.", "visual.trunk.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed"),
    ("vision_model.encoder.layers.", "visual.trunk.blocks."),
    ("vision_model.post_layernorm.", "visual.trunk.norm."),
    (_PROBE, "visual.trunk.attn_pool.latent"),
    ("vision_model.head.attention.out_proj.", "visual.trunk.attn_pool.proj."),
    ("vision_model.head.layernorm.", "visual.trunk.attn_pool.norm."),
    ("vision_model.head.mlp.", "visual.trunk.attn_pool.mlp."),
    ("logit_", "logit_"),
)
_IN_TEXT_BLOCK = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.in_proj_", "attn.in_proj_"),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_IN_IMAGE_BLOCK = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("self_attn.in_proj_", "attn.qkv."),
    ("self_attn.out_proj.", "attn.proj."),
    ("mlp.", "mlp."),
)
_POOL = "vision_model.head.attention.in_proj_"
_QKV = re.compile(r"(.*self_attn\.)([qkv])_proj\.(weight|bias)")


def is_transformers_siglip(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a `SiglipModel`."""
    return _PROBE in weights


def open_clip_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a `SiglipModel` by open_clip's names.

    The pooling's queries, and its keys and values, are one matrix in transformers and two in timm.

    Args:
        weights: by transformers' names.
        path: their file, for messages.

    Raises:
        CheckpointError: a name is not one of a `SiglipModel`, or a part is missing.
    """
    converted: dict[str, Tensor] = {}
    for name, value in _joined(weights, path).items():
        if name.startswith(_POOL):
            kind, width = name.removeprefix(_POOL), len(value) // 3
            converted[f"visual.trunk.attn_pool.q.{kind}"] = value[:width].contiguous()
            converted[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:].contiguous()
            continue
        ours = _our_name(name)
        if ours is None:
            raise CheckpointError(f"{path}: {name} is not a weight of SiglipModel")
        converted[ours] = value[None] if ours == "visual.trunk.pos_embed" else value
    return converted


def _joined(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights with queries, keys and values of a block in one matrix."""
    joined: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        third = _QKV.fullmatch(name)
        if third is not None:
            thirds.setdefault(f"{third[1]}in_proj_{third[3]}", {})[third[2]] = value
        elif not name.endswith("position_ids"):
            joined[name] = value
    for name, found in thirds.items():
        if len(found) < 3:
            raise CheckpointError(f"{path}: queries, keys or values are missing for {name}")
        joined[name] = torch.cat([found[letter] for letter in "qkv"])
    return joined


def _our_name(name: str) -> str | None:
    """open_clip's name of a weight; None if a `SiglipModel` has no such weight."""
    part = next((part for part in _PARTS if name.startswith(part[0])), None)
    if part is None:
        return None
    rest = name.removeprefix(part[0])
    if not part[0].endswith("layers."):
        return part[1] + rest
    number, _, inner = rest.partition(".")
    modules = _IN_TEXT_BLOCK if part[1].startswith("text.") else _IN_IMAGE_BLOCK
    found = next((each for each in modules if inner.startswith(each[0])), None)
    return found and f"{part[1]}{number}.{found[1]}{inner.removeprefix(found[0])}"


def architecture_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of the `SiglipModel` that `config.json` describes.

    Args:
        config: content of `config.json`; what it leaves out has transformers' default.
        where: the file, for messages.

    Raises:
        UserError: open_clip has no towers of these sizes.
    """
    text = {**_TEXT_DEFAULTS, **dict(config.get("text_config") or {})}
    vision = {**_VISION_DEFAULTS, **dict(config.get("vision_config") or {})}
    activations = {part.get("hidden_act", _ACTIVATION) for part in (text, vision)}
    if activations == {_ACTIVATION}:
        for name in open_clip.list_models():
            found = cast(dict[str, Any], open_clip.get_model_config(name))
            if _has_sizes(found, text, vision):
                # Some of open_clip's configurations leave the approximation out for the text.
                found["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
                return found
    raise UserError(
        f"{where}: open_clip has no SigLIP towers of these sizes (image {vision['hidden_size']} "
        f"wide, {vision['num_hidden_layers']} layers, {vision['image_size']} pixels; text "
        f"{text['hidden_size']} wide, {text['num_hidden_layers']} layers, {text['vocab_size']} "
        f"tokens; activations {sorted(activations)})"
    )


_BOTH = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_TEXT_DEFAULTS = {**_BOTH, "vocab_size": 32000, "max_position_embeddings": 64}
_VISION_DEFAULTS = {**_BOTH, "image_size": 224, "patch_size": 16}


def _has_sizes(found: dict[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> bool:
    """Whether a configuration of open_clip has the sizes of the two of transformers."""
    words, image = found["text_cfg"], found["vision_cfg"]
    tower = image.get("timm_model_name")
    ours = (
        words.get("width"), words.get("layers"), words.get("heads"), words.get("vocab_size"),
        words.get("context_length"), words.get("pool_type"), words.get("hf_model_name"),
        int(words.get("width", 0) * words.get("mlp_ratio", 4.0)),
        image.get("timm_pool"), image.get("image_size"), found["embed_dim"],
    )  # fmt: skip
    theirs = (
        text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"],
        text["vocab_size"], text["max_position_embeddings"], "last", None,
        text["intermediate_size"],
        "map", vision["image_size"], text.get("projection_size", text["hidden_size"]),
    )  # fmt: skip
    if ours != theirs or not tower:
        return False
    with torch.device("meta"):
        trunk = cast(Any, timm.create_model(tower))
    attention, mlp = trunk.blocks[0].attn, trunk.blocks[0].mlp
    return (
        trunk.embed_dim, len(trunk.blocks), attention.num_heads, mlp.fc1.out_features,
        trunk.patch_embed.patch_size[0],
    ) == (
        vision["hidden_size"], vision["num_hidden_layers"], vision["num_attention_heads"],
        vision["intermediate_size"], vision["patch_size"],
    )  # fmt: skip


PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
"""How `SiglipImageProcessor` makes images unless `preprocessor_config.json` says otherwise."""
