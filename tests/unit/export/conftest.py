import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

TINY_VIT = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def _write_repository(folder, **changes):
    """A repository of an untrained tiny model, with weights that are nowhere at their first values.

    Changes are laid over the architecture, section by section.
    """
    config = {
        key: {**TINY_VIT[key], **value} if isinstance(value, dict) else value
        for key, value in {**TINY_VIT, **changes}.items()
    }
    folder.mkdir()
    whole = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    built = dict(config)
    kind = open_clip.CustomTextCLIP if built.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(1)
    with torch.no_grad():
        model = kind(**built)
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def write_repository():
    return _write_repository


@pytest.fixture
def make_repository(tmp_path):
    return lambda **changes: _write_repository(tmp_path / "tiny-vit", **changes)


@pytest.fixture
def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def texts():
    return ["a cat", "Two dogs, it's", "Ünïcode 42 and more words than there are places for at all"]
