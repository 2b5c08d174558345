"""Drawings compared without colours, place and size."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from neuclip.data.outlines import distinct, floor_top1, nearest, outline

WHITE = (255, 255, 255)


def drawn(shape, *, at=(10, 10), side=30, colour=(0, 0, 0), back=WHITE):
    image = Image.new("RGB", (64, 64), back)
    pen = ImageDraw.Draw(image)
    box = (*at, at[0] + side, at[1] + side)
    if shape == "slice":
        pen.pieslice(box, 20, 300, fill=colour)
    else:
        {"disc": pen.ellipse, "box": pen.rectangle}[shape](box, fill=colour)
    return outline(np.asarray(image), back)


def test_colour_place_and_size_do_not_count():
    first = drawn("slice")
    others = np.stack(
        [
            drawn("slice", at=(2, 3), side=50, colour=(200, 30, 30), back=(240, 250, 240)),
            drawn("disc"),
        ]
    )
    best, place = nearest(first[None], others)
    assert place.tolist() == [0]
    assert best[0] > 0.93 > nearest(first[None], others[1:])[0][0]


@pytest.mark.parametrize("side", [0, 1, 2])
def test_as_good_as_empty(side):
    assert not drawn("box", side=side).any()


def test_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    queries, others = (rng.integers(0, 256, (n, 256), dtype=np.uint8) for n in (5, 7))
    expected = np.corrcoef(queries.astype(float), others.astype(float))[:5, 5:]
    best, place = nearest(queries, others)
    assert np.allclose(best, expected.max(1), atol=1e-6)
    assert place.tolist() == expected.argmax(1).tolist()


def test_the_order_of_the_sums_does_not_count():
    """As processors differ in that order, ties fell one way or the other (float32 products)."""
    rng = np.random.default_rng(0)
    queries, others = (rng.integers(0, 256, (n, 256), dtype=np.uint8) for n in (40, 300))
    pixels = rng.permutation(256)
    best, place = nearest(queries, others)
    shuffled, same_place = nearest(queries[:, pixels], others[:, pixels])
    assert best.tolist() == shuffled.tolist()
    assert place.tolist() == same_place.tolist()


def test_the_first_of_equals_is_the_nearest(monkeypatch):
    monkeypatch.setattr("neuclip.data.outlines._ROWS", 2)
    others = np.stack([drawn("box"), drawn("disc", side=20), drawn("disc"), drawn("disc")])
    assert nearest(others[3:], others[2:])[1].tolist() == [0]
    assert nearest(others[2:3], others)[1].tolist() == [2]
    assert nearest(others[1:2], others[[0, 2, 3, 1, 1]])[1].tolist() == [3]


def test_an_even_outline_resembles_none():
    even = np.full((1, 256), 7, np.uint8)
    assert nearest(even, np.concatenate([even, drawn("disc")[None]]))[0].tolist() == [0]
    assert distinct([[0, 1]], np.concatenate([even, even]), 0.95) == [0, 1]


def test_no_others():
    best, _ = nearest(drawn("box")[None], np.zeros((0, 256), np.uint8))
    assert best.tolist() == [-1]


def test_distinct_keeps_the_first_of_each_kind():
    outlines = np.stack([drawn("disc"), drawn("disc", side=20), drawn("box"), drawn("disc")])
    assert distinct([[1, 0, 2], [3]], outlines, 0.95) == [1, 2, 3]


def test_accuracy_without_learning():
    names = ["disc", "box", "slice", "disc", "box", "disc"]
    outlines = np.stack([drawn(name, side=20 + 5 * n) for n, name in enumerate(names)])
    said = [*names[:4], "slice", "ring"]  # the second box and the third disc bear other names
    found = [floor_top1(own, range(3), outlines, said.__getitem__) for own in ([3], [3, 4], [5])]
    assert found == [1, 0.5, None]  # no training picture is a ring
