"""Markdown tables between the markers of a page; figures that are equal for equal rows."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from neuclip.errors import UserError

BEGIN = "<!-- results of {block}: written by {writer} report -->"
END = "<!-- /results of {block} -->"


def write_between(path: Path, text: str, writer: str, block: str) -> None:
    """Writes the text between the markers of a block in a page.

    Raises:
        UserError: the page does not contain both markers once.
    """
    content = path.read_text(encoding="utf-8")
    path.write_text(between_markers(content, text, path, writer, block), encoding="utf-8")


def between_markers(content: str, text: str, document: Path, writer: str, block: str) -> str:
    """The content with the text between the markers of a block.

    Raises:
        UserError: the document does not contain both markers once.
    """
    begin, end = BEGIN.format(block=block, writer=writer), END.format(block=block)
    if content.count(begin) != 1 or content.count(end) != 1:
        raise UserError(f"{document}: the lines {begin!r} and {end!r} must each occur once")
    head, rest = content.split(begin)
    return f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"


def percent(values: Iterable[float]) -> str:
    """Mean in percent, with the standard deviation over several seeds."""
    return number((100 * value for value in values), "{:.1f}")


def number(values: Iterable[float | None], form: str = "{:.2f}") -> str:
    """Mean, with the standard deviation if there are several values; "-" if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = form.format(statistics.mean(known))
    return f"{text} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else text


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or an empty text if it has no rows."""
    if not body:
        return ""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save_figure(figure: Figure | None, path: Path, title: str) -> None:
    """Writes a figure as SVG, the same file for the same rows; none: nothing was run for it.

    Args:
        figure: the figure.
        path: the file.
        title: above its first axes.
    """
    if figure is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.axes[0].set_title(title, fontsize=8)
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
