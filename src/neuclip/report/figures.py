"""Curves and bars as inline SVG, in the colours and fonts of the page.

matplotlib draws in placeholder colours, which CSS variables then replace: the same drawing works
on a light and on a dark page. Equal data give equal bytes.
"""

import io
import re
import textwrap
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, FAINT = "#0b0001", "#0b0002"
SERIES = tuple(f"#0a000{number}" for number in range(1, 7))
MARKERS = "osD^vP"
POINTS_PER_CURVE = 200
WIDTH = 5.0
ROUND_STEPS = (1, 2, 5, 10)
LEAST_RANGE = 0.01
"""Of a vertical axis, as a fraction of its values."""

STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # labels are whole values
}


@dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
        label: the run, for the text that describes the drawing.
        color: index of the colour; runs that differ in the seed alone share it.
        points: (x, y).
        legend: name in the legend; empty: not in the legend.
        dotted: a reference, drawn dotted and not in the legend.
    """

    label: str
    color: int
    points: list[tuple[float, float]]
    legend: str = ""
    dotted: bool = False


@dataclass(frozen=True)
class Bars:
    """One bar per label."""

    label: str
    color: int
    values: list[float]


def curves(
    name: str,
    lines: list[Curve],
    *,
    percent: bool = False,
    marked: bool = False,
    from_zero: bool = False,
) -> str:
    """Draws lines over samples seen; long lines are averaged to `POINTS_PER_CURVE` points.

    Args:
        name: unique on the page; prefix of the drawing's ids.
        lines: the lines.
        percent: the values are fractions, shown as percentages.
        marked: mark every point.
        from_zero: the vertical axis starts at 0; with `percent` it always does.
    """
    with drawing_style(name):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            points = _thin(line.points)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=SERIES[line.color % len(SERIES)],
                label=clip_label(line.legend, 40) or "_hidden",
                linestyle=":" if line.dotted else _line_style(line.color),
                marker=MARKERS[(line.color + line.color // len(SERIES)) % len(MARKERS)],
                markersize=4.5,
                markevery=1 if marked else max(1, len(points) // 6),
            )
        axes.set_xlabel("samples seen")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
        if percent or from_zero:
            # The margin was that of the data's own range, and may have cut the highest marker.
            axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.05 * axes.dataLim.y1))
        else:
            _widen(axes)
        if percent:
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        _legend(figure, axes)
        return as_inline(figure, name)


def _widen(axes: Axes) -> None:
    """Shows a change in the fifth digit, as of a temperature that is kept, as a level line."""
    low, high = axes.get_ylim()
    least = LEAST_RANGE * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def stacked(name: str, labels: list[str], parts: list[Bars]) -> str:
    """Draws one horizontal bar per label, stacked from fractions."""
    with drawing_style(name, grid="x"):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.38 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(labels)
        places = list(range(len(labels)))
        for part in parts:
            color = SERIES[part.color % len(SERIES)] if part.color >= 0 else FAINT
            axes.barh(places, part.values, 0.62, left=left, color=color, label=part.label)
            left = [a + b for a, b in zip(left, part.values, strict=True)]
        axes.set_yticks(places, [wrap_label(label) for label in labels])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        _legend(figure, axes)
        return as_inline(figure, name)


def grouped(name: str, labels: list[str], groups: list[Bars]) -> str:
    """Draws horizontal bars: per label one bar of each group, with its value."""
    with drawing_style(name, grid="x"):
        height = 1.2 + 0.3 * len(labels) * len(groups)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        thick = 0.8 / len(groups)
        for number, group in enumerate(groups):
            shift = (number - (len(groups) - 1) / 2) * thick
            places = [place + shift for place in range(len(labels))]
            color = SERIES[group.color] if group.color >= 0 else FAINT
            bars = axes.barh(places, group.values, thick * 0.9, color=color, label=group.label)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
        axes.set_yticks(range(len(labels)), [wrap_label(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.12)
        _legend(figure, axes)
        return as_inline(figure, name)


def drawing_style(
    name: str, grid: str = "y", colors: Mapping[str, str] | None = None
) -> AbstractContextManager[None]:
    """The style of all drawings.

    Args:
        name: unique on the page.
        grid: axis with a grid.
        colors: final colours by placeholder; none: keep the placeholders.
    """
    settings = {**STYLE, "svg.hashsalt": name, "axes.grid.axis": grid}
    if colors is not None:
        settings = {key: colors.get(str(value), value) for key, value in settings.items()}
    return rc_context(cast("dict[RcKeyType, Any]", settings))


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    block = -(-len(points) // POINTS_PER_CURVE)
    if block <= 1:
        return points
    blocks = [points[start : start + block] for start in range(0, len(points), block)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in blocks
    ]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 3 if max(map(len, labels)) <= 18 else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns))


def clip_label(label: str, most: int) -> str:
    """A label for matplotlib, shortened in its middle to `most` letters."""
    half = (most - 2) // 2
    short = label if len(label) <= most else f"{label[: most - 2 - half]}..{label[-half:]}"
    # An unescaped "$" would start a formula.
    return short.replace("$", r"\$")


def wrap_label(label: str) -> str:
    """A label for an axis, on two lines of 24 letters; longer ones are shortened in the middle."""
    return "\n".join(textwrap.wrap(clip_label(label, 46), 24, max_lines=2, placeholder=".."))


def _line_style(color: int) -> str:
    """Solid for the first colours, dashed and dash-dotted once they repeat."""
    return ("-", "--", "-.")[color // len(SERIES) % 3]


def as_inline(figure: Figure, name: str) -> str:
    """The drawing as an `svg` element with the page's colours and unique ids."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    for number, color in enumerate(SERIES, start=1):
        svg = svg.replace(color, f"var(--series-{number})")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
