"""A report that is made anew while its runs go on."""

from collections.abc import Callable, Iterable
from pathlib import Path

from neuclip.errors import UserError
from neuclip.run_folder import RunFolder

Stamp = tuple[tuple[Path, int, int], ...]


def stamp(folders: Iterable[Path]) -> Stamp:
    """What changes when runs write records or results: files, their sizes and times of change."""
    found: list[tuple[Path, int, int]] = []
    for run in map(RunFolder, folders):
        for path in (run.metrics, *sorted(run.eval_results.glob("*"))):
            try:
                status = path.stat()
            except OSError:  # not there yet, or no longer
                continue
            found.append((path, status.st_size, status.st_mtime_ns))
    return tuple(found)


def watch(
    write: Callable[[bool], object],
    stamp: Callable[[], Stamp],
    running: Callable[[], bool],
    wait: Callable[[], None],
    complain: Callable[[str], None],
) -> bool:
    """Writes a page whenever its runs have changed, until none runs; then a last time.

    Ctrl-C ends it early. The last page is written in any case, so that it does not reload itself.

    Args:
        write: writes the page; True: one that reloads itself.
        stamp: what the runs have written so far.
        running: whether any run goes on.
        wait: waits until the runs may have changed.
        complain: receives the message of a page that could not be made; the next one is tried.

    Returns:
        Whether the runs have ended by themselves.

    Raises:
        UserError: the first or the last page cannot be made.
    """
    seen: Stamp | None = None
    try:
        while running():  # first: what a run writes before it ends is on the last page
            now = stamp()
            if now != seen:
                try:
                    write(True)
                except UserError as error:
                    if seen is None:
                        raise
                    complain(f"{error}; the page is tried again after the next change")
                seen = now
            wait()
    except KeyboardInterrupt:
        write(False)
        return False
    write(False)
    return True
