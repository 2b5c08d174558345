"""`neuclip report`: run folders to one self-contained HTML page.

In reading order:

- `runs`: reads run folders.
- `run_list`: run folders, one line each, for `neuclip runs`.
- `quoted`: reads published numbers.
- `entries`: groups runs that differ only in the seed, and reads their scores.
- `bootstrap`: computes confidence intervals of differences.
- `scoreboard`: compares entries: all scores and their differences to the baseline.
- `panels`: draws the scoreboard's figure.
- `comparison`: compares runs: the best result of each split and the table of metrics.
- `forgetting`: what fine-tuning gained and forgot against the starting weights.
- `figures`: draws curves and bars of runs.
- `blend_curve`: draws the results of `neuclip blend`.
- `page`: composes the page.
- `watching`: makes the page anew while its runs go on.

Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neuclip.errors import UserError
from neuclip.files import cannot_write, write_whole
from neuclip.untrusted import open_regular

_START = 8192
"""Bytes of a figure that hold its metadata."""


@dataclass(frozen=True)
class ReportOptions:
    """The choice of comparisons, and whether the page reloads itself.

    Attributes:
        baseline: method or run to compare with; none: openclip if there is one, else the first.
        published: training set whose published numbers are quoted; none: no published numbers.
        reload: seconds after which the open page reloads itself, while its runs go on; none: never.
    """

    baseline: str | None = None
    published: str | None = None
    reload: int | None = None


def write_report(run_dirs: list[Path], out: Path, options: ReportOptions | None = None) -> Path:
    """Writes one self-contained page about all runs. Equal inputs give equal bytes.

    If the page has a comparison, its figure is also written beside the page, as PNG and SVG of the
    same name. A file of that name that no report has written is not replaced.

    Args:
        run_dirs: run folders; the page lists missing content.
        out: the HTML file; replaced in one piece, its folder made if missing.
        options: choice of comparisons.

    Returns:
        `out`.

    Raises:
        UserError: a folder is not a run folder, the baseline or the training set is unknown, a
            figure would replace a file of another origin, or the page cannot be written.
    """
    # Imported here because matplotlib is slow to import.
    from neuclip.report.page import compose
    from neuclip.report.panels import WRITER, panel_files

    page = compose(run_dirs, options or ReportOptions())
    figures: dict[Path, str | bytes] = {}
    if page.board is not None:
        files = panel_files(page.board.panels)
        figures = {out.with_suffix(".svg"): files.svg, out.with_suffix(".png"): files.png}
        check_replaceable(figures, WRITER, "--out")
    for path, content in {out: page.html, **figures}.items():
        write_whole(path, content)
    return out


def check_replaceable(paths: Iterable[Path], writer: str, flag: str) -> None:
    """Checks that figures replace only figures of the same command.

    Args:
        paths: where figures will be written.
        writer: the command, as in the metadata of its figures.
        flag: names the path on the command line, for the message.

    Raises:
        UserError: a file of another origin has the name of a figure.
    """
    for path in paths:
        try:
            with open_regular(path) as file:
                ours = writer.encode() in file.read(_START)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise cannot_write(path, error) from None
        if not ours:
            raise UserError(
                f"{path} exists and was not written by `{writer}`, which would write its figure "
                f"there: move it, or choose another name ({flag})"
            )
