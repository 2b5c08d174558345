"""Mistakes that the user can mend: the command line prints them without a traceback."""


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
