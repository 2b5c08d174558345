import io

import numpy as np
import pytest
from PIL import Image

from datacomp_sets import CodedTowers, picture
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.search.engine import Engine


@pytest.fixture
def engine(pictures, images, towers):
    return Engine(towers, open_source(str(pictures)), images)


def test_the_nearest_are_those_of_all(engine, exact_features):
    for number in (1, 9, 10):
        scores = exact_features[:, number]
        found = engine.by_text(f"number {number}", 3)
        told = [hit.score for hit in found.hits]
        np.testing.assert_allclose(told, np.sort(scores)[::-1][:3], atol=1e-6)
        np.testing.assert_allclose(told, scores[[hit.position for hit in found.hits]], atol=1e-6)
    assert found.hits[0].caption == "colors (10, 11, 12)" and found.hits[0].key == "6"


def test_more_than_there_are(engine):
    assert len(engine.by_text("number 1", 100).hits) == 7


def test_an_uploaded_image(engine):
    assert engine.by_image(picture((4, 5, 6)), 1).hits[0].position == 1


def test_images_similar_to_one_of_them(engine, exact_features):
    hits = engine.like(0, 6).hits
    scores = exact_features @ exact_features[0]
    assert 0 not in [hit.position for hit in hits] and len(hits) == 6
    told = [hit.score for hit in hits]
    np.testing.assert_allclose(told, np.sort(scores[1:])[::-1], atol=1e-6)
    np.testing.assert_allclose(told, scores[[hit.position for hit in hits]], atol=1e-6)


def test_a_text_that_fills_the_context_gets_a_note(engine):
    class Short(CodedTowers):
        @property
        def tokenize(self):
            return lambda texts: super(Short, self).tokenize([text[:8] for text in texts])

    engine._encoder = Short()
    assert "exceeds the model's context length" in engine.by_text("number 1 and more", 1).note


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_an_empty_text(engine, text):
    with pytest.raises(UserError, match="Type a few words"):
        engine.by_text(text, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "The file is empty"),
        (b"hello", r"cannot be read as an image \(unknown image format \(5 bytes\)\)"),
        (picture((1, 2, 3))[:40], "cannot be read as an image"),
    ],
)
def test_not_an_image(engine, content, words):
    with pytest.raises(UserError, match=words):
        engine.by_image(content, 1)


def test_a_position_without_image(engine):
    for call in (lambda: engine.like(7, 1), lambda: engine.thumbnail(7, 64)):
        with pytest.raises(UserError, match="There is no image 7"):
            call()


def test_thumbnails(engine, pictures):
    large = Image.new("RGB", (400, 100), (9, 9, 9))
    large.save(pictures / "3.png")
    assert Image.open(io.BytesIO(engine.thumbnail(0, 64))).size == (8, 8)
    assert Image.open(io.BytesIO(engine.thumbnail(3, 64))).size == (64, 16)
    (pictures / "3.png").unlink()
    with pytest.raises(UserError, match="no longer readable"):
        engine.thumbnail(3, 64)
