import io
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from datacomp_sets import CodedTowers, picture
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.search import engine as module
from neuclip.search.engine import Engine
from neuclip.search.exact_search import Nearest
from neuclip.search.query_vector import SearchQuery


@pytest.fixture
def engine(pictures, images, towers):
    return Engine(towers, open_source(str(pictures)), images)


def positions(found):
    return [hit.position for hit in found.hits]


def test_the_nearest_are_those_of_all(engine, exact_features):
    for number in (1, 9, 10):
        scores = exact_features[:, number]
        found = engine.search(SearchQuery(f"number {number}"), 3)
        told = [hit.score for hit in found.hits]
        np.testing.assert_allclose(told, np.sort(scores)[::-1][:3], atol=1e-6)
        np.testing.assert_allclose(told, scores[positions(found)], atol=1e-6)
    assert found.hits[0].caption == "colors (10, 11, 12)" and found.hits[0].key == "6"


def test_more_than_there_are(engine):
    found = engine.search(SearchQuery("number 1"), 100)
    assert len(found.hits) == found.total == 7


def test_an_uploaded_image(engine):
    name = engine.add_picture(picture((4, 5, 6)))
    assert positions(engine.search(SearchQuery(pictures=(name,)), 1)) == [1]


def test_images_similar_to_one_of_them(engine, exact_features):
    found = engine.search(SearchQuery(like=(0,)), 6)
    scores = exact_features @ exact_features[0]
    assert 0 not in positions(found) and len(found.hits) == found.total == 6
    told = [hit.score for hit in found.hits]
    np.testing.assert_allclose(told, np.sort(scores[1:])[::-1], atol=1e-6)
    np.testing.assert_allclose(told, scores[positions(found)], atol=1e-6)


def test_words_and_pictures_together(engine, exact_features):
    name = engine.add_picture(picture((4, 5, 6)))
    found = engine.search(SearchQuery('number 9 -"number 8"', (name,), (6, 2)), 9)
    mean = (np.eye(64)[9] + exact_features[1] + exact_features[6] + exact_features[2]) / 4
    vector = 2 * mean - np.eye(64)[8]
    scores = exact_features @ (vector / np.linalg.norm(vector))
    order = [row for row in np.argsort(-scores, kind="stable").tolist() if row not in (6, 2)]
    assert positions(found) == order and found.total == 5
    np.testing.assert_allclose([hit.score for hit in found.hits], scores[order], atol=1e-6)


def test_captions_that_contain_a_text(engine):
    found = engine.search(SearchQuery("number 1", caption="COLORS (1,"), 9)
    assert sorted(positions(found)) == [0, 4] and found.total == 2
    assert engine.search(SearchQuery("number 1", caption="nowhere"), 9).hits == []


def test_no_image_is_on_two_pages(engine, monkeypatch):
    monkeypatch.setattr(module, "DEEPEST", 5)
    pages = [engine.search(SearchQuery("number 60", like=(3,)), 2, start) for start in (0, 2, 4, 6)]
    found = [*chain(*map(positions, pages))]
    assert [page.total for page in pages] == [5] * 4 and len(found) == len({*found}) == 5


def test_an_index_is_asked_unless_captions_are_filtered(pictures, images, towers):
    class Index:
        def nearest(self, query, number):
            return Nearest(np.array([3]), np.array([0.5], np.float32))

    engine = Engine(towers, open_source(str(pictures)), images, Index())
    assert positions(engine.search(SearchQuery("number 1"), 9)) == [3]
    assert positions(engine.search(SearchQuery("number 1", caption="10,"), 9)) == [6]


def test_a_text_that_fills_the_context_gets_a_note(pictures, images):
    class Short(CodedTowers):
        @property
        def tokenize(self):
            return lambda texts: super(Short, self).tokenize([text[:8] for text in texts])

    engine = Engine(Short(), open_source(str(pictures)), images)
    note = engine.search(SearchQuery("number 1 and more"), 1).note
    assert "exceeds the model's context length" in note


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_an_empty_text(engine, text):
    with pytest.raises(UserError, match="Type a few words"):
        engine.search(SearchQuery(text, caption="colors"), 1)


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
        engine.add_picture(content)


def test_a_position_without_image(engine):
    for call in (lambda: engine.search(SearchQuery(like=(7,)), 1), lambda: engine.thumbnail(7, 64)):
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
