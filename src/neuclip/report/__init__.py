"""`neuclip report`: run folders to one self-contained HTML page.

In reading order:

- `runs`: reads run folders.
- `quoted`: reads published numbers.
- `entries`: groups runs that differ only in the seed, and reads their scores.
- `bootstrap`: computes confidence intervals of differences.
- `scoreboard`: compares entries: all scores and their differences to the baseline.
- `panels`: draws the scoreboard's figure.
- `comparison`: compares runs: the best result of each split and the table of metrics.
- `figures`: draws curves and bars of runs.
- `page`: composes the page.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportOptions:
    """The choice of comparisons.

    Attributes:
        baseline: method or run to compare with; none: openclip if there is one, else the first.
        published: training set whose published numbers are quoted; none: no published numbers.
    """

    baseline: str | None = None
    published: str | None = None


def write_report(run_dirs: list[Path], out: Path, options: ReportOptions | None = None) -> Path:
    """Writes one self-contained page about all runs. Equal inputs give equal bytes.

    If the page has a comparison, its figure is also written beside the page, as PNG and SVG of the
    same name.

    Args:
        run_dirs: run folders; the page lists missing content.
        out: the HTML file; replaced in one piece, its folder made if missing.
        options: choice of comparisons.

    Returns:
        `out`.

    Raises:
        UserError: a folder is not a run folder, the baseline or the training set is unknown, or
            the page cannot be written.
    """
    # Imported here because matplotlib is slow to import.
    from neuclip.files import write_whole
    from neuclip.report.page import compose
    from neuclip.report.panels import panel_files

    page = compose(run_dirs, options or ReportOptions())
    write_whole(out, page.html)
    if page.board is not None:
        files = panel_files(page.board.panels)
        write_whole(out.with_suffix(".svg"), files.svg)
        write_whole(out.with_suffix(".png"), files.png)
    return out
