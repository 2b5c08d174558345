"""Errors that users can fix, printed without a traceback, and the wording of their messages."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the user's input: the value, its source, and the remedy.

    The command line prints the message alone and exits with code 2. It is not a `ValueError`, so
    code that expects a library's does not swallow it.
    """


class Preempted(Exception):
    """A signal asked the run to stop, and what it has done is in a checkpoint.

    Args:
        message: where it stopped.
        name: of the run.
        interrupted: Ctrl-C asked; a scheduler must not start the run again.

    Attributes:
        argv: the command line that started the run, if it is not that of the process.
    """

    def __init__(self, message: str, name: str, *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.name, self._interrupted = name, interrupted
        self.argv: list[str] | None = None

    @property
    def exit_code(self) -> int:
        """What the command line exits with: 130 after Ctrl-C, as shells count; otherwise 75.

        75 is EX_TEMPFAIL, for scripts that put the job back in the queue: not finished, start it
        again.
        """
        return 130 if self._interrupted else 75


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


_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that move the cursor, change colours, turn the direction of text, or cannot be shown;
without tab and newline."""


def without_controls(text: str) -> str:
    """Text for a terminal or a log: its lines as they are, with control characters as escapes."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def all_of(pieces: Iterable[Callable[[], T]]) -> list[T]:
    """The results of some pieces of work, or the errors of all of them in one.

    Raises:
        UserError: pieces failed; each distinct message is a line.
    """
    found: list[T] = []
    problems: list[str] = []
    for piece in pieces:
        try:
            found.append(piece())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return found


_SHORT_LIST = 24
"""Largest number of known words that a message lists."""


def nearest(word: str, known: list[str], listing: str = "") -> str:
    """The end of an error message: the nearest known words, and all of them if they are few.

    Args:
        word: the unknown word.
        known: the known words.
        listing: command that prints the known words, named if they are many.
    """
    plain = {_plain(name): name for name in reversed(known)}
    found = difflib.get_close_matches(_plain(word), plain, n=3)
    close = [plain[name] for name in found]
    short = len(known) <= _SHORT_LIST
    hint = f"did you mean {_either(close[:1] if short else close)}?" if close else ""
    if short:
        return f"{hint} known: {', '.join(sorted(known))}".strip()
    more = f"{listing} lists all {len(known)}" if listing else f"{len(known)} are known"
    return f"{hint} {more}".strip()


def quantity(number: float, noun: str) -> str:
    """A number with its noun: `1 epoch`, `2 batches`, `0.5 points`, `13,000 samples`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    plural = noun + ("es" if noun.endswith(("s", "x", "tch")) else "s")
    return f"{shown} {noun if number == 1 else plural}"


def _plain(word: str) -> str:
    """A word without case and punctuation, for comparison."""
    return "".join(letter for letter in word.lower() if letter.isalnum())


def _either(words: list[str]) -> str:
    quoted = [repr(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
