"""`neuclip report`: compares runs with each other and with published numbers, on an HTML page.

Imports matplotlib only when it runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page: comparison, tables, curves, retrieved images.

    The comparison groups runs that differ only in the seed. Its figure (DataComp average, ImageNet
    & variants, retrieval; or the runs' own splits) is also written beside the page, as PNG and SVG.
    """

    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ]
    """run folders"""
    out: Path = Path("report.html")
    """HTML file to write"""
    baseline: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: openclip, or the first)")
    ] = None
    """method or run to compare the others with"""
    published: Switch = False
    """add published numbers, marked as quoted"""
    published_data: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: DFN-14M)")
    ] = None
    """training set of the published numbers: CC3M, CC12M, DFN-14M, DFN-192M, DFN-1B"""


def report(command: Report) -> int:
    """Writes the page and prints its path.

    Raises:
        UserError: no run is given, a folder is not a run folder, the baseline is unknown, or the
            page cannot be written.
    """
    from neuclip.report import ReportOptions, write_report

    if not command.runs:
        raise UserError("report needs at least one run folder, for example ./logs/my-run")
    if command.published_data is not None and not command.published:
        raise UserError("--published-data has no effect without --published: add --published")
    if command.out.suffix in {".png", ".svg"}:
        raise UserError(f"--out {command.out}: give an HTML file; the figure is written beside it")
    data = (command.published_data or "DFN-14M") if command.published else None
    out = write_report(list(command.runs), command.out, ReportOptions(command.baseline, data))
    print(out)
    return 0
