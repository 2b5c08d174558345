"""The files of transformers' `CLIPModel` beside its weights: configuration, tokenizer, processor.

Only towers that compute the same function are converted: plain ViTs for images and OpenAI's
transformer for texts. Any other architecture is refused with the reason.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from neuclip.model.export_info import Vocabulary
from neuclip.model.transformers_names import LAYER_NORM_EPS, RESAMPLE

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PROCESSOR, _TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
_SPECIAL, _VOCABULARY, _MERGES = "special_tokens_map.json", "vocab.json", "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"

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
        "layer_norm_eps": LAYER_NORM_EPS,
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
        "resample": RESAMPLE[preprocessing["interpolation"]],
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
