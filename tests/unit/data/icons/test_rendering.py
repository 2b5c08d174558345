"""SVG of strangers as small images."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from neuclip.data.icons import rendering
from neuclip.data.icons.rendering import Look, Svg, draw, draw_all
from neuclip.errors import UserError

LOOK = Look(4, (200, 0, 0), (255, 255, 255))
BOX = (0.0, 0.0, 16.0, 16.0)
GOOD = Svg('<rect x="2" y="2" width="12" height="12" fill="currentColor"/>', BOX)


def test_place_and_colours():
    image = draw(GOOD, LOOK, 64)
    assert image.shape == (64, 64, 3)
    assert image[32, 32].tolist() == [200, 0, 0]
    assert (image[:4] == 255).all() and (image[:, -4:] == 255).all()


def test_shape_is_kept():
    wide = Svg('<rect width="32" height="16" fill="currentColor"/>', (0, 0, 32, 16))
    inked = (draw(wide, LOOK, 64) != 255).any(-1)
    assert inked.any(1).sum() == 28 and inked.any(0).sum() == 56


def nested_uses(depth):
    groups = "".join(
        f'<g id="a{n}">' + f'<use href="#a{n - 1}"/>' * 10 + "</g>" for n in range(1, depth)
    )
    return f'<rect id="a0" width="1" height="1"/>{groups}<use href="#a{depth - 1}"/>'


@pytest.mark.parametrize(
    ("svg", "reason"),
    [
        (Svg('<image href="http://127.0.0.1:9/a.png"/>', BOX), "refers to something outside"),
        (Svg('<use xlink:href="file:///etc/passwd#a"/>', BOX), "refers to something outside"),
        (Svg("<script>1</script>", BOX), "refers to something outside"),
        (Svg("<style>@import 'a.css';</style>", BOX), "refers to something outside"),
        (Svg('<rect fill="url(other.svg#a)"/>', BOX), "refers to something outside"),
        (Svg('<!ENTITY a "aaaa">', BOX), "refers to something outside"),
        (Svg(" " * 2**21, BOX), "refers to something outside"),
        (Svg("<rect", BOX), "cannot be drawn"),
        (Svg(GOOD.body, (0, 0, 16, 160_000)), "cannot be drawn"),
        (Svg(GOOD.body, (0, 0, 0, 0)), "cannot be drawn"),
        (Svg(GOOD.body, (0, 0, float("nan"), 16)), "cannot be drawn"),
        (Svg(nested_uses(8), BOX), "cannot be drawn"),
        (Svg('<rect fill="none" width="9" height="9"/>', BOX), "is empty"),
        (Svg("", BOX), "is empty"),
    ],
)
def test_what_is_not_drawn_has_a_reason(svg, reason):
    assert rendering._draw((svg, LOOK, 64, 60)) == reason


def test_local_references_are_drawn():
    body = '<defs><path id="p" d="M2 2h12v12H2z"/></defs><use href="#p" fill="currentColor"/>'
    assert draw(Svg(body, BOX), LOOK, 64)[32, 32].tolist() == [200, 0, 0]


def test_a_drawing_that_takes_too_long_is_counted_and_the_others_are_drawn():
    noise = '<feTurbulence baseFrequency="0.001" numOctaves="2000000000"/>'
    body = f'<filter id="f">{noise}</filter><rect width="16" height="16" filter="url(#f)"/>'
    huge = Svg(body, BOX)
    found = draw_all([(GOOD, LOOK), (huge, LOOK), (GOOD, LOOK)], 64, 1, seconds=1)
    assert found.failures == {"takes too much time or memory": [1]}
    images = [np.asarray(Image.open(io.BytesIO(found.pngs[at]))) for at in (0, 2)]
    assert all((image == draw(GOOD, LOOK, 64)).all() for image in images)
    assert not found.pngs[1] and not found.outlines[1].any()


def test_processes_that_cannot_start_are_an_error(monkeypatch):
    monkeypatch.setattr(rendering, "_limit", os.abort)  # in each new process
    with pytest.raises(UserError, match="drawing processes end at once"):
        draw_all([(GOOD, LOOK)], 64, 1)
