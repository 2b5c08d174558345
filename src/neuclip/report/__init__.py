"""`neuclip report`: run folders to one self-contained HTML page.

Modules, lowest first: `runs` (reads folders); `figures` (draws), `comparison` (verdict and table);
`page` (composes). No torch.
"""

from pathlib import Path


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Writes one self-contained page over all runs. Equal inputs give equal bytes.

    Args:
        run_dirs: Run folders; missing pieces are named on the page.
        out: The HTML file; replaced in one piece, its folder made if missing.

    Returns:
        `out`.

    Raises:
        UserError: a folder is no run folder (says what it lacks), or there is no right to write.
    """
    # Here, not above: matplotlib takes long to import, and only who draws should wait for it.
    from neuclip.evaluation.results import write_whole
    from neuclip.report.page import compose

    write_whole(out, compose(run_dirs))
    return out
