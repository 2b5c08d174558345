import open_clip
import pytest
import torch
from PIL import Image

from neuclip.cli.app import main
from neuclip.export.transformers_clip import obstacle

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"text_cfg": {"vocab_size": 49408, "heads": 4, "mlp_ratio": 2.0}},
    ],
    ids=["gelu", "quickgelu", "custom text", "other text tower"],
)
def test_clip_model_gives_the_same_embeddings(
    make_repository, tmp_path, pictures, texts, changes, capsys
):
    repository, out = make_repository(**changes), tmp_path / "out"
    assert main(["export", str(repository), "--format", "hf", "--out", str(out)]) == 0
    assert "CLIPModel.from_pretrained" in capsys.readouterr().out
    theirs, loading = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    ours, _, _ = open_clip.create_model_and_transforms(f"local-dir:{repository}")
    tokens = open_clip.get_tokenizer(f"local-dir:{repository}")(texts)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(out)
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ours.eval()
    with torch.no_grad():
        outputs = theirs(pixel_values=pictures, **words)
        images, captions, scale = ours(pictures, tokens)
    torch.testing.assert_close(outputs.image_embeds, images, rtol=0, atol=2e-6)
    torch.testing.assert_close(outputs.text_embeds, captions, rtol=0, atol=2e-6)
    logits = scale * images @ captions.T
    torch.testing.assert_close(outputs.logits_per_image, logits, rtol=1e-5, atol=1e-5)


def test_its_processor_reads_pictures_and_texts_as_open_clip_does(make_repository, tmp_path, texts):
    repository, out = make_repository(), tmp_path / "out"
    main(["export", str(repository), "--format", "hf", "--out", str(out)])
    processor = transformers.CLIPProcessor.from_pretrained(out)
    noise = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    read = processor(
        text=texts, images=picture, padding="max_length", truncation=True, return_tensors="pt"
    )
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{repository}")
    torch.testing.assert_close(read["pixel_values"][0], preprocess(picture))
    tokens = open_clip.get_tokenizer(f"local-dir:{repository}")(texts)
    end = tokens.argmax(dim=1)
    for row, (theirs, ours) in enumerate(zip(read["input_ids"], tokens, strict=True)):
        assert theirs[: end[row] + 1].tolist() == ours[: end[row] + 1].tolist()
        assert (theirs[end[row] :] == 49407).all()  # transformers pads with the end of a text


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14-336", "ViT-H-14"]
)
def test_openai_architectures_have_a_counterpart(name):
    assert obstacle(dict(open_clip.get_model_config(name))) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RN50", "image tower is a ResNet"),
        ("glyph-tiny", "image tower is a ResNet"),
        ("convnext_base", "timm's convnext_base"),
        ("xlm-roberta-base-ViT-B-32", "text tower is xlm-roberta-base"),
        ("ViT-B-16-SigLIP", "timm's vit_base_patch16_siglip_224"),
        ("coca_ViT-B-32", "CLIPModel has no"),
        ("ViTamin-S", "timm's vitamin_small_224"),
    ],
)
def test_others_say_why_they_have_none(name, words):
    assert words in (obstacle(dict(open_clip.get_model_config(name))) or "")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
        ("vision_cfg", "ls_init_value", 0.1),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "qk_norm", True),
        ("text_cfg", "proj_bias", True),
    ],
)
def test_what_clip_model_does_not_compute(section, key, value):
    config = open_clip.get_model_config("ViT-B-32")
    config[section] = {**config[section], key: value}
    assert f"CLIPModel has no {section}.{key} = {value!r}" in (obstacle(config) or "")
