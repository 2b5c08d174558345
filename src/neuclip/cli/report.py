"""`neuclip report`: runs as one HTML page, compared with each other and with published numbers.

Imports nothing that draws before there is something to draw.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page: comparison, curves, tables, retrieved pictures.

    Runs that differ in nothing but the seed are one method in the comparison. Its figure (DataComp
    average, ImageNet & variants, retrieval; or the runs' own splits) is also written beside the
    page, as PNG and SVG.
    """

    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ]
    """run folders"""
    out: Path = Path("report.html")
    """the page"""
    baseline: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: openclip, or the first)")
    ] = None
    """method or run that differences are taken to"""
    published: Switch = False
    """add published numbers, marked as quoted"""
    published_data: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: DFN-14M)")
    ] = None
    """training set whose published numbers are drawn: CC3M, CC12M, DFN-14M, DFN-192M, DFN-1B"""


def report(command: Report) -> int:
    """Writes the page and says where.

    Raises:
        UserError: no runs, no run folder, no such baseline, or no right to write.
    """
    from neuclip.report import ReportOptions, write_report

    if not command.runs:
        raise UserError("report needs at least one run folder, for example ./logs/my-run")
    if command.published_data is not None and not command.published:
        raise UserError("--published-data chooses among published numbers: add --published")
    if command.out.suffix in {".png", ".svg"}:
        raise UserError(f"--out {command.out}: the page is HTML; the figure is written beside it")
    data = (command.published_data or "DFN-14M") if command.published else None
    out = write_report(list(command.runs), command.out, ReportOptions(command.baseline, data))
    print(out)
    return 0
