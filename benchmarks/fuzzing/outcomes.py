"""How a case ends: as damage, a refusal or an answer. Whatever else it raises is a fault."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from neuclip.cli.app import main
from neuclip.config.data_sections import ReadingConfig
from neuclip.data.decode import ImageDecoder
from neuclip.data.opening import open_source
from neuclip.data.samples import SampleError
from neuclip.data.sources.source import Captions, Source
from neuclip.errors import UserError

GOOD = ("answer", "damage", "refusal")
_READ = 60  # samples of a case
_MAX_PIXELS = 2**24  # a WebP takes up to 27 bytes a pixel while it is decoded
_decode = ImageDecoder(_MAX_PIXELS)
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONGEST = 2**20


def read(
    pattern: str, reading: ReadingConfig | None = None, captions: Captions = "required"
) -> str:
    """Opens a source and reads and decodes its first samples, as training would."""
    try:
        source = open_source(pattern, reading, captions=captions)
    except UserError:
        return "refusal"
    with contextlib.closing(source):
        return "damage" if len(source.damage) + _corrupt(source) else "answer"


def _corrupt(source: Source) -> int:
    corrupt = 0
    for position in range(min(len(source), _READ)):
        try:
            source.read_with(position, _decode)
        except SampleError:
            corrupt += 1
    return corrupt


def refused(work: Callable[[], object]) -> str:
    """`answer`, or `refusal` if the work raises a `UserError`."""
    try:
        work()
    except UserError:
        return "refusal"
    return "answer"


class Printed(AssertionError):
    """A command printed what must not reach a terminal."""


def command(folder: Path, argv: Sequence[str]) -> str:
    """Runs a command as a shell would, and checks its exit code and what it printed.

    Raises:
        Printed: a traceback, a control character, or very much.
    """
    output = folder / "printed"
    with _output_to(output):
        try:
            code = main(list(argv))
        except SystemExit as end:  # of the parser of flags
            code = end.code
    text = output.read_bytes().decode("utf-8", "backslashreplace")
    found = _UNSEEN.search(text)
    if "Traceback (most recent" in text:
        raise Printed(text[-1500:])
    if found is not None:
        raise Printed(f"{found[0]!r} in {text[max(0, found.start() - 100) :][:200]!r}")
    if len(text) > _LONGEST:
        raise Printed(f"{len(text):,} characters: {text[:300]!r}")
    if code not in (0, 1, 2):
        raise Printed(f"exit code {code!r}: {text[-500:]!r}")
    return "refusal" if code else "damage" if "corrupt" in text else "answer"


@contextlib.contextmanager
def _output_to(path: Path):
    """Sends both output streams to a file, whoever holds them."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, start=1):
            os.dup2(old, number)
            os.close(old)
        os.close(opened)
        root = logging.getLogger()
        for handler in root.handlers[:]:
            root.removeHandler(handler)
