import open_clip
import pytest

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.architecture import find_architecture
from neuclip.model.patches import grid


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", (7, 7)),
        ("ViT-L-14-336", (24, 24)),
        ("ViT-SO400M-14-SigLIP-384", (27, 27)),  # timm leaves out the rest of the image
        ("RN50", (7, 7)),
        ("convnext_base_w", None),
        ("MobileCLIP-S1", None),
    ],
)
def test_the_grid_of_a_model(name, expected):
    assert grid(open_clip.get_model_config(name)["vision_cfg"]) == expected


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("ViT-B-32", 100, "--force-image-size 100: ViT-B-32 .* 32 x 32 .* sizes are 96 and 128$"),
        ("ViT-L-14", (224, 100), "size 224 100: ViT-L-14 .* are 224 98 and 224 112$"),
        ("ViT-B-16-SigLIP", 250, "are 240 and 256$"),
        ("RN50", 200, "are 192 and 224$"),
        ("ViT-B-32", 10, "the nearest size is 32$"),
    ],
)
def test_sizes_that_patches_do_not_cover(name, size, words):
    with pytest.raises(UserError, match=words):
        find_architecture(name).changed(ModelConfig(force_image_size=size))
    recorded = find_architecture(name).changed(ModelConfig(force_image_size=size), recorded=True)
    assert recorded.resized == size  # a run of open_clip's: it left out the rest


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ViT-B-32", 96),
        ("ViT-B-32", (224, 64)),
        ("ViT-SO400M-14-SigLIP-384", 384),
        ("convnext_base_w", 100),
    ],
)
def test_other_sizes(name, size):
    assert find_architecture(name).changed(ModelConfig(force_image_size=size)).resized == size
