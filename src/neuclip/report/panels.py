"""Draws the scoreboard: one panel per measure, one bar per entry, one dot per seed.

The page has one drawing per panel. The files for papers and slides have all panels in a row.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neuclip.report.figures import (
    FAINT,
    INK,
    ROUND_STEPS,
    SERIES,
    as_inline,
    clip_label,
    drawing_style,
    wrap_label,
)
from neuclip.report.scoreboard import Panel, PanelBar

_PAPER = ("#1f5fd0", "#d9581a", "#0f8a5f", "#9333b0", "#a87900", "#c2255c")
LIGHT = {INK: "#1b1f27", FAINT: "#b4bcc8", **dict(zip(SERIES, _PAPER, strict=True))}
_NAME = "panels"
WRITER = "neuclip report"
"""In the metadata of the files, by which a later report knows that it may replace them."""
DOTS_PER_INCH = 200


@dataclass(frozen=True)
class PanelFiles:
    """The figure for a paper or a slide."""

    png: bytes
    svg: str


def inline_panels(panels: Sequence[Panel]) -> list[str]:
    """One SVG per panel, in the colours of the page, so that a narrow page can stack them."""
    with drawing_style(_NAME, grid="x"):
        return [
            as_inline(_draw([panel], _labels(panels)), f"{_NAME}-{number}")
            for number, panel in enumerate(panels)
        ]


def panel_files(panels: Sequence[Panel]) -> PanelFiles:
    """The figure as PNG and SVG on white. Equal inputs give equal bytes."""
    with drawing_style(_NAME, grid="x"):
        svg = io.StringIO()
        figure = _draw(panels, _labels(panels))
        marked = {**dict.fromkeys(("Date", "Format", "Type")), "Creator": WRITER}
        figure.savefig(svg, format="svg", metadata=marked, facecolor="white")
    text = svg.getvalue()
    for placeholder, color in LIGHT.items():
        text = text.replace(placeholder, color)
    with drawing_style(_NAME, grid="x", colors=LIGHT):
        png = io.BytesIO()
        figure = _draw(panels, _labels(panels), LIGHT)
        figure.savefig(
            png, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": WRITER}
        )
    return PanelFiles(png.getvalue(), text)


def _labels(panels: Sequence[Panel]) -> list[str]:
    """The rows of every panel."""
    return list(dict.fromkeys(bar.label for panel in panels for bar in panel.bars))


def _draw(
    panels: Sequence[Panel], labels: list[str], colors: dict[str, str] | None = None
) -> Figure:
    colors = colors or {name: name for name in LIGHT}
    height = 1.15 + 0.42 * max(1, len(labels))
    figure = Figure(figsize=(3.4 * len(panels) + 1.4, height), layout="constrained")
    first: Axes | None = None
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number, sharey=first)
        first = first or axes
        _draw_panel(axes, panel, labels, colors)
        if number > 1:
            axes.tick_params(labelleft=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, labels: list[str], colors: dict[str, str]) -> None:
    ink = colors[INK]
    axes.set_title(clip_label(panel.title, 40), fontsize=11, loc="left", pad=8)
    ends = [0.0]
    for bar in panel.bars:
        place = labels.index(bar.label)
        ends.append(_draw_bar(axes, bar, place, colors))
    if panel.chance is not None:
        axes.axvline(100 * panel.chance, color=ink, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(labels)), [wrap_label(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    spread = any(bar.deviation is not None for bar in panel.bars)
    end = max(ends)
    axes.set_xlim(0, end * (1.42 if spread else 1.22) or 1)  # room for the values
    ticks = MaxNLocator(5, steps=ROUND_STEPS).tick_values(0, end or 1)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= min(100, axes.get_xlim()[1])])
    axes.set_xlabel("%")
    drawn = {bar.label for bar in panel.bars}
    for place, label in enumerate(labels):
        if label not in drawn:
            _annotate(axes, "not published", (0, place), ink)


def _draw_bar(axes: Axes, bar: PanelBar, place: int, colors: dict[str, str]) -> float:
    """Draws a bar and returns its right end, in per cent."""
    ink, quoted = colors[INK], bar.color < 0
    if bar.mean is None:
        _annotate(axes, bar.why, (0, place), ink, italic=True)
        return 0.0
    mean, spread = 100 * bar.mean, 100 * (bar.deviation or 0.0)
    color = colors[SERIES[max(0, bar.color) % len(SERIES)]]
    axes.barh(
        place, mean, 0.66,
        color="none" if quoted else color,
        edgecolor=ink if quoted else color,
        hatch="////" if quoted else None,
        linewidth=0.8,
    )  # fmt: skip
    if bar.deviation is not None:
        axes.errorbar(mean, place, xerr=spread, color=ink, capsize=3, linewidth=1.2)
        dots = [100 * value for value in bar.values]
        axes.plot(dots, [place] * len(dots), "o", color=ink, markersize=3, alpha=0.65)
    end = max(mean + spread, *(100 * value for value in bar.values))
    text = f"{mean:.2f}" + (f" ± {spread:.2f}" if bar.deviation is not None else "")
    note = f"\n{bar.why}" if bar.why else ""
    _annotate(axes, text + note, (end, place), ink)
    return end


def _annotate(
    axes: Axes, text: str, place: tuple[float, float], color: str, *, italic: bool = False
) -> None:
    """Writes a text to the right of a point."""
    axes.annotate(
        text, place, xytext=(5, 0), textcoords="offset points", va="center", fontsize=9,
        color=color, style="italic" if italic else "normal",
    )  # fmt: skip
