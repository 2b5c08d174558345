"""`neuclip runs`: the runs of a folder in a table. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal


@dataclass(frozen=True)
class RunsCommand:
    """List the runs of a folder: method, data, progress, best metric and state.

    A run is running while a process holds its folder, finished if it reached its last epoch or
    ended early as asked, and stopped otherwise.
    """

    logs: Annotated[Positional[Path], arg(metavar="LOGS", help_behavior_hint="")] = Path("logs")
    """folder of run folders (default: ./logs), or one run folder"""


def show_runs(command: RunsCommand) -> int:
    """Prints the table.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    from neuclip.parallel.folder_lock import holder_of
    from neuclip.report.run_list import list_runs

    terminal.print_runs(list_runs(command.logs, lambda folder: holder_of(folder.path)))
    return 0
