"""Curves of the report: axes that one can read."""

import re

import pytest

from neuclip.report.figures import Curve, curves


def drawn(values, **more):
    points = [(128.0 * number, value) for number, value in enumerate(values)]
    return curves("plot", [Curve("run", 0, points)], marked=True, **more)


def test_a_temperature_that_is_kept_is_a_level_line_with_whole_values():
    svg = drawn([0.0611292, 0.0611297, 0.06113])
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    values = [float(label) for label in labels if re.fullmatch(r"0\.\d+", label)]
    assert len(values) >= 2
    assert all(0.0605 < value < 0.0617 for value in values)
    assert not any("e" in label and label != "samples seen" for label in labels)


@pytest.mark.parametrize("more", [{"percent": True}, {"from_zero": True}, {}])
def test_no_marker_is_cut_at_the_top(more):
    svg = drawn([0.173, 0.1725, 0.172], **more)
    top = float(re.search(r'<clipPath[^>]*>\s*<rect x="[\d.]+" y="([\d.]+)"', svg)[1])
    marks = re.search(r'<g clip-path="[^"]*">\s*((?:<use [^>]*/>\s*)+)', svg)[1]
    heights = [float(y) for y in re.findall(r' y="([\d.]+)"', marks)]
    assert len(heights) == 3
    assert min(heights) > top + 2.25  # points: half a marker
