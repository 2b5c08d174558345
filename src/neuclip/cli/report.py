"""`neuclip report`: compares runs with each other and with published numbers, on an HTML page.

Imports matplotlib only when it runs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.options import Switch, check_range
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.report import ReportOptions

WATCH = "--watch"
_SECONDS = 30


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
    watch: Annotated[
        int | None, arg(metavar="[SECONDS]", help_behavior_hint="(default of SECONDS: 30)")
    ] = None
    """make the page anew while the runs go on, whenever they have written something; look every
    SECONDS. The open page reloads itself. Ctrl-C stops it"""


def with_seconds(argv: Sequence[str]) -> list[str]:
    """The arguments with the default of `--watch` where it stands without a number."""
    found: list[str] = []
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        found.append(word)
        if word == WATCH and not following.lstrip("-").replace(".", "", 1).isdecimal():
            found.append(str(_SECONDS))
    return found


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
    check_range("watch", command.watch, ge=1)
    data = (command.published_data or "DFN-14M") if command.published else None
    options = ReportOptions(command.baseline, data)
    if command.watch is not None:
        _watch(command, command.watch, options)
    else:
        write_report(list(command.runs), command.out, options)
    print(command.out)
    return 0


def _watch(command: Report, seconds: int, options: "ReportOptions") -> None:
    """Makes the page whenever the runs have changed, until they end or Ctrl-C."""
    from neuclip.parallel.folder_lock import holder_of
    from neuclip.report import write_report
    from neuclip.report.watching import stamp, watch

    folders = list(command.runs)

    def write(again: bool) -> None:
        shown = replace(options, reload=seconds) if again else options
        write_report(folders, command.out, shown)

    terminal.say(f"{command.out} is made anew while the runs go on (Ctrl-C stops it)")
    ended = watch(
        write,
        lambda: stamp(folders),
        lambda: any(holder_of(folder) is not None for folder in folders),
        lambda: time.sleep(seconds),
        terminal.say,
    )
    terminal.say("no run goes on: the page is final" if ended else "stopped: the page is as of now")
