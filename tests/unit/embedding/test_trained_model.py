"""`neuclip.load`: the features of evaluation, row by row, and errors that name the image."""

import io
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import neuclip
from neuclip.data.opening import open_source
from neuclip.data.sources.image_list import ImageList
from neuclip.embedding.trained_model import _check_unreadable
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.evaluation.zero_shot import class_vectors
from tiny_models import VIT, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save({"state_dict": tiny().towers.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return neuclip.load(checkpoint, arch=VIT, device="cpu", batch_size=4, workers=0)


@pytest.fixture
def files(tmp_path):
    """Ten files in several formats and colour modes."""
    numbers = np.random.default_rng(0)
    paths = []
    for row, (mode, ending) in enumerate([("RGB", "png"), ("L", "jpg"), ("RGBA", "webp")] * 3):
        pixels = numbers.integers(0, 256, (40, 50 + row, 4), dtype=np.uint8)
        paths.append(tmp_path / f"{row}.{ending}")
        Image.fromarray(pixels).convert(mode).save(paths[-1])
    paths.append(tmp_path / "palette.png")
    Image.fromarray(numbers.integers(0, 256, (40, 40, 3), np.uint8)).quantize(7).save(paths[-1])
    return paths


def test_features_are_those_of_evaluation_and_of_open_clip(model, demo_dir, checkpoint):
    folder = str(demo_dir / "unseen_character_test")
    source = open_source(folder)
    settings = EvaluationSettings(batch_size=4, workers=0)
    encoder = model._loaded.encoder
    expected = encode_split(encoder, start_reading(encoder, source, settings))
    rows = expected.first_captions()
    found = model.embed_images(source)
    assert torch.equal(found, expected.image_features[rows])
    assert torch.equal(found, model.embed_images(folder))
    texts = [expected.captions[row] for row in rows]
    assert torch.equal(model.embed_texts(texts), expected.text_features[rows])

    theirs, _, transform = open_clip.create_model_and_transforms(VIT, pretrained=str(checkpoint))
    images = torch.stack([transform(source.read(position).image) for position in range(4)])
    with torch.no_grad():
        other = theirs.eval().encode_image(images, normalize=True)
    torch.testing.assert_close(found[:4], other, rtol=1e-5, atol=1e-6)


def test_paths_images_and_one_image_are_the_same(model, files):
    by_path = model.embed_images(files)
    assert by_path.shape == (10, model.embed_dim) and by_path.dtype == torch.float32
    torch.testing.assert_close(by_path.norm(dim=1), torch.ones(10))
    assert torch.equal(by_path, model.embed_images([Image.open(path) for path in files]))
    assert torch.equal(by_path, model.embed_images([str(path) for path in files]))
    mixed = [path if row % 2 else Image.open(path) for row, path in enumerate(files)]
    assert torch.equal(by_path, model.embed_images(mixed))
    one = model.embed_images(files[3])
    assert one.shape == (1, model.embed_dim)
    torch.testing.assert_close(one[0], by_path[3], rtol=1e-5, atol=1e-6)
    assert torch.equal(one, model.embed_images(Image.open(files[3])))


def test_an_unreadable_image_among_many(model, files, tmp_path):
    expected = model.embed_images(files)
    files[5].write_bytes(files[5].read_bytes()[:100])
    content = io.BytesIO((tmp_path / "0.png").read_bytes()[:-400])
    lazy = Image.open(content)  # truncated: only its first use fails
    images = [*files, tmp_path / "nowhere.png", lazy]
    with pytest.raises(UserError) as caught:
        model.embed_images(images)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 12 images cannot be read"
    assert [line.split(": ")[1] for line in lines[1:4]] == [
        "image_truncated",
        "image_missing",
        "image",
    ]
    assert str(files[5]) in lines[1] and "image 11: " in lines[3]
    found = model.embed_images(images, unreadable="nan")
    good = [row for row in range(10) if row != 5]
    torch.testing.assert_close(found[good], expected[good], rtol=1e-5, atol=1e-6)
    assert found[[5, 10, 11]].isnan().all() and not found[good].isnan().any()
    labels = model.classify(found, ["a", "b"]).labels
    assert [row for row, label in enumerate(labels) if label is None] == [5, 10, 11]
    with pytest.raises(UserError, match=r"no sample could be read\n.*nowhere.png: image_missing"):
        model.embed_images(tmp_path / "nowhere.png", unreadable="nan")


def test_classes(model, files):
    names, templates = ["cat", "dog", "tall tree"], ["a photo of a {c}.", "{}"]
    found = model.classify(files, names, templates)
    vectors = class_vectors(model._loaded.encoder, names, ["a photo of a {c}.", "{c}"], 4)
    scores = np.exp(model.logit_scale * (model.embed_images(files) @ vectors.T).double().numpy())
    expected = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4)
    assert found.labels == [names[column] for column in expected.argmax(axis=1)]
    best = found.top(2)[0]
    order = (-expected[0]).argsort()[:2]
    assert [name for name, _ in best] == [names[column] for column in order]
    assert len(found.top(9)[0]) == 3


def test_similarity_takes_features_too(model, files):
    texts = ["a cat", "a dog", "a horse", "a fish", "a bird"]
    images, words = model.embed_images(files), model.embed_texts(texts)
    found = model.similarity(files, texts)
    assert found.shape == (10, 5)
    assert torch.equal(found, images @ words.T)
    assert torch.equal(found, model.similarity(images, words))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "none is given"),
        ("cat", "a list is expected"),
        (["cat", " "], "number 2 is empty"),
        (["cat", "dog", "cat "], "number 3, 'cat', is the same as number 1"),
    ],
)
def test_names_that_cannot_be_classes(model, files, names, message):
    with pytest.raises(UserError, match=message):
        model.classify(files, names)


def test_other_mistakes(model, checkpoint, tmp_path):
    for call, message in (
        (lambda: model.embed_images([]), "the list of images is empty"),
        (lambda: ImageList([3]), "image 0 is of type int"),
        (lambda: model.embed_images(str(tmp_path / "nothing")), "nothing"),
        (lambda: model.embed_texts([]), "the list of texts is empty"),
        (lambda: model.embed_texts("a cat"), "a list of texts is expected"),
        (lambda: model.class_vectors(["a"], ["no place"]), "has no {c}"),
        (lambda: model.class_vectors(["a"], "a {c}"), "templates: a list is expected"),
        (lambda: _check_unreadable("skip"), "'raise' or 'nan' is expected"),
        (lambda: model.similarity(torch.ones(2, 3), ["a"]), r"images: .* these have \[2, 3\]"),
        (
            lambda: model.similarity(Image.new("RGB", (40, 40)), torch.ones(2, 3)),
            r"texts: features of this model .* these have \[2, 3\]",
        ),
        (lambda: neuclip.load(tmp_path / "nowhere"), "nowhere"),
        (lambda: neuclip.load(checkpoint.parent), "give the run folder|one of its files"),
        (lambda: neuclip.load(checkpoint, arch=VIT, batch_size=0), "batch_size 0"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_import_stays_fast():
    """`import neuclip` loads neither torch nor anything of `load`."""
    code = "import neuclip, sys; print(sorted({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
