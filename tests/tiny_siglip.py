"""A SigLIP of few parameters, with an image tower of timm's kind."""

import open_clip
import timm
from timm.models import vision_transformer

NAME = "tiny-siglip"
TOWER = "vit_tiny_patch8_siglip_32"
CONFIG = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": TOWER, "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2,
        "hf_tokenizer_name": "org/words", "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip


def vit_tiny_patch8_siglip_32(pretrained=False, **settings):
    """A SigLIP tower of the size for tests, made as timm makes its own."""
    return vision_transformer._create_vision_transformer(
        TOWER, pretrained=pretrained, patch_size=8, img_size=32, embed_dim=32, depth=2,
        num_heads=2, mlp_ratio=2, class_token=False, act_layer="gelu_tanh",
        **{"global_pool": "map", **settings},
    )  # fmt: skip


def register(monkeypatch):
    """Makes the tower known to timm, and the model to open_clip."""
    monkeypatch.setitem(timm.models._registry._model_entrypoints, TOWER, vit_tiny_patch8_siglip_32)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, CONFIG)
