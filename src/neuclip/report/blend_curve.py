"""Draws the results of mixes of two models over alpha, for a paper or a slide."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neuclip.evaluation.blend_choice import Mix
from neuclip.report.figures import FAINT, INK, ROUND_STEPS, SERIES, WIDTH, drawing_style
from neuclip.report.panels import DOTS_PER_INCH, LIGHT

WRITER = "neuclip blend"
"""In the metadata of the file, by which a later blend knows that it may replace it."""


def draw_blend(mixes: Sequence[Mix], chosen: Mix, form: str) -> bytes:
    """The curve on white. Equal inputs give equal bytes.

    Args:
        mixes: results, by rising alpha.
        chosen: the mix to mark.
        form: `png` or `svg`.
    """
    with drawing_style("blend", colors=LIGHT):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.add_subplot()
        alphas = [mix.alpha for mix in mixes]
        lines = [("own data", "o", "-", [mix.own for mix in mixes])]
        if all(mix.canary is not None for mix in mixes):
            lines += [
                ("canary", "s", "-", [mix.canary or 0.0 for mix in mixes]),
                ("mean", "", "--", [mix.mean or 0.0 for mix in mixes]),
            ]
        for (label, marker, style, values), color in zip(lines, SERIES, strict=False):
            axes.plot(
                alphas, [100 * value for value in values], style, label=label, marker=marker,
                markersize=4.5, color=LIGHT[INK] if label == "mean" else LIGHT[color],
                linewidth=1.0 if label == "mean" else 1.6,
            )  # fmt: skip
        axes.axvline(chosen.alpha, color=LIGHT[INK], linestyle=":", linewidth=1, zorder=0)
        axes.annotate(
            f"chosen: {chosen.alpha:g}", (chosen.alpha, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", fontsize=9.5, va="bottom",
            ha="left" if chosen.alpha < 0.15 else "right" if chosen.alpha > 0.85 else "center",
        )  # fmt: skip
        axes.set_xlabel("alpha (0: OLD, 1: NEW)")
        axes.set_ylabel("%")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
        axes.spines[["left", "bottom"]].set_color(LIGHT[FAINT])
        if len(lines) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        buffer = io.BytesIO()
        marked = {"Software": WRITER}
        if form == "svg":
            marked = {**dict.fromkeys(("Date", "Format", "Type")), "Creator": WRITER}
        figure.savefig(buffer, format=form, dpi=DOTS_PER_INCH, facecolor="white", metadata=marked)
    return buffer.getvalue()
