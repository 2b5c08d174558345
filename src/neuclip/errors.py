"""Mistakes that the user can mend: the command line prints them without a traceback."""

import difflib


class UserError(ValueError):
    """A mistake in the user's input: what is wrong, where it came from, and what would be right.

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
    """Another process of the run failed; says which, and why. This one can only stop, too."""


def nearest(word: str, known: list[str]) -> str:
    """The ending of an error message: the nearest known word, and all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
