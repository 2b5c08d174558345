"""Patterns with braces, such as `shards/{0000..1926}.tar`."""

import re

from braceexpand import braceexpand

from neuclip.errors import UserError, printable
from neuclip.untrusted import whole_number

_MOST = 1_000_000  # names in a pattern
_DEEPEST = 20  # braces inside of braces

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for; an empty pattern stands for none.

    Raises:
        UserError: the braces are not balanced, are nested too deep, or stand for more than a
            million names.
    """
    if _number(pattern) > _MOST:
        raise UserError(f"the pattern '{printable(pattern)}' stands for more than {_MOST:,} names")
    try:
        return list(braceexpand(pattern)) if pattern else []
    except ValueError:  # braceexpand's UnbalancedBracesError, or a step of very many digits
        raise UserError(f"unbalanced braces in the pattern '{printable(pattern)}'") from None


def _number(pattern: str) -> int:
    """An upper bound of the number of names, cut off above `_MOST`."""
    done: list[int] = []  # names of the finished alternatives, for each open brace
    names: list[int] = [1]  # names of the alternative that is read, likewise
    starts: list[int] = []
    for match in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        token = match[0]
        if token == "{":
            done.append(0)
            names.append(1)
            starts.append(match.end())
            if len(starts) > _DEEPEST:
                raise UserError(
                    f"braces nested more than {_DEEPEST} deep in the pattern '{printable(pattern)}'"
                )
        elif token == "," and starts:
            done[-1] += names[-1]
            names[-1] = 1
        elif token == "}" and starts:
            inner = max(done.pop() + names.pop(), _length(pattern[starts.pop() : match.start()]))
            names[-1] = min(names[-1] * inner, _MOST + 1)
    return names[0]


def _length(expression: str) -> int:
    """Number of names that a range such as `0000..1926` stands for; 1 for anything else."""
    found = _RANGE.fullmatch(expression)
    if not found:
        return 1
    first, last = map(_end, found.groups())
    return _MOST + 1 if first is None or last is None else abs(last - first) + 1


def _end(text: str) -> int | None:
    number = whole_number(text.removeprefix("-"))
    return -number if number is not None and text.startswith("-") else number
