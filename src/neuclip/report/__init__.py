"""`neuclip report`: run folders to one self-contained HTML page.

Modules, lowest first: `runs` (reads folders), `published` (quoted numbers); `entries` (what is
compared), `bootstrap` (how sure a difference is), `scoreboard` (all scores); `figures` and `panels`
(draw), `comparison` (verdict and table of runs); `page` (composes). No torch.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportOptions:
    """What is compared with what.

    Attributes:
        baseline: Method or run that differences are taken to; none: openclip, or else the first.
        published: Training set whose published numbers are quoted beside; none: no numbers.
    """

    baseline: str | None = None
    published: str | None = None


def write_report(run_dirs: list[Path], out: Path, options: ReportOptions | None = None) -> Path:
    """Writes one self-contained page over all runs. Equal inputs give equal bytes.

    Where there is something to compare, the figure is also written beside the page, as PNG and SVG
    of the same name.

    Args:
        run_dirs: Run folders; missing pieces are named on the page.
        out: The HTML file; replaced in one piece, its folder made if missing.
        options: What is compared with what.

    Returns:
        `out`.

    Raises:
        UserError: a folder is no run folder (says what it lacks), there is no such baseline or data
            set, or there is no right to write.
    """
    # Here, not above: matplotlib takes long to import, and only who draws should wait for it.
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
