"""Errors that users can fix: the command line prints them without a traceback."""

import difflib


class UserError(ValueError):
    """A mistake in the user's input: the value, its source, and the remedy.

    The command line prints the message alone and exits with code 2; in a library call it is an
    ordinary `ValueError`.
    """


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has written a checkpoint.

    Attributes:
        exit_code: what the command line exits with, for scripts that put the job back in the queue
            (EX_TEMPFAIL: not finished, start it again).
    """

    exit_code = 75


class OtherProcessFailed(Exception):
    """Another rank of the run failed; the message names it and the cause."""


def printable(text: str, length: int = 80) -> str:
    """Text from a file or another program, in one short line without control characters.

    Args:
        text: any text, also one decoded with `surrogateescape`.
        length: maximum number of characters.
    """
    kept = text[: length + 1]
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in kept)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def nearest(word: str, known: list[str]) -> str:
    """The end of an error message: the nearest known word, and the list of known words."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
