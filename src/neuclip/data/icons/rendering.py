"""Draws SVG from packages of others as small RGB images, in bounded time and memory.

resvg draws: it fetches nothing, runs no script, and limits the number of nodes. What refers to
anything outside of itself is refused before. Drawing processes have a limit of memory, and a timer
ends one that a drawing keeps busy. Such a drawing is counted, and the others are drawn again.
"""

import colorsys
import contextlib
import io
import re
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuclip.data.outlines import SIDE, Outlines, outline
from neuclip.data.progress import Progress
from neuclip.errors import UserError
from neuclip.interrupts import end_with_parent

Colour = tuple[int, int, int]
Failure = Literal[
    "refers to something outside", "cannot be drawn", "is empty", "takes too much time or memory"
]

SECONDS = 10
"""CPU time for one drawing: on a busy machine, too, the result is the same."""
MEMORY = 2 * 2**30
"""Bytes that drawing may add to a process."""

_CHUNK = 200
_DPI = 96  # as browsers; resvg's own default scales what is given in other units than pixels
_MAX_BODY = 2**20
_MAX_ASPECT = 8
_OUTSIDE = re.compile(
    r"<!|<\?|<\s*(?:image|script|foreignObject|iframe|style)\b|(?:href|src)\s*=\s*[\"']\s*(?!#)"
    r"|url\(\s*[\"']?\s*(?!#)|@import",
    re.IGNORECASE,
)
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Svg:
    """A vector image.

    Attributes:
        body: what is inside of the `svg` element.
        box: left, top, width and height of the view box.
    """

    body: str
    box: tuple[float, float, float, float]

    @classmethod
    def of_set(cls, content: Mapping[str, Any], name: str) -> "Svg":
        """An icon of a set in Iconify's JSON form."""
        icon = content["icons"][name]
        left, top, width, height = (
            float(icon.get(key, content.get(key, default)))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return cls(str(icon["body"]), (left, top, width, height))


@dataclass(frozen=True)
class Look:
    """How an icon is placed and coloured.

    Attributes:
        margin: around the drawing, in pixels.
        front: the current colour, in which icons of one colour are drawn.
        background: fills the image.
    """

    margin: int
    front: Colour
    background: Colour

    @classmethod
    def draw(cls, chance: Random, margins: tuple[int, int], *, one_colour: bool) -> "Look":
        """Chooses a look at random: a light background, and a dark or strong colour.

        Args:
            chance: random generator.
            margins: smallest and largest margin in pixels.
            one_colour: whether the icon is drawn in the current colour.
        """
        margin, background = chance.randint(*margins), _WHITE
        if chance.random() < 0.45:
            hue, saturation = chance.random(), chance.uniform(0.02, 0.16)
            background = _rgb(hue, saturation, chance.uniform(0.95, 1))
        grey = chance.randrange(40)
        front = (grey, grey, grey)
        if one_colour and chance.random() < 0.6:
            hue, saturation = chance.random(), chance.uniform(0.5, 1)
            front = _rgb(hue, saturation, chance.uniform(0.25, 0.75))
        return cls(margin, front, background)


@dataclass(frozen=True)
class Drawings:
    """Images of icons.

    Attributes:
        pngs: the image files; empty where drawing failed.
        outlines: of the images; zeros where drawing failed.
        failures: positions of the icons that are not drawn, by reason.
    """

    pngs: list[bytes]
    outlines: Outlines
    failures: dict[Failure, list[int]]


_Job = tuple[Svg, Look, int, float]
_Done = tuple[bytes, NDArray[np.uint8]] | Failure


def check_renderer() -> None:
    """Checks that resvg is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import resvg_py  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError(
            "drawing SVG needs resvg: install it with pip install 'neuclip[icons]'"
        ) from None


def draw_all(
    icons: Sequence[tuple[Svg, Look]],
    size: int,
    processes: int,
    progress: Progress | None = None,
    seconds: float = SECONDS,
) -> Drawings:
    """Draws icons; the result does not depend on the number of processes.

    Args:
        icons: what to draw, and how.
        size: width and height of the images in pixels.
        processes: number of drawing processes.
        progress: called after each 200 icons.
        seconds: limit of CPU time for one drawing.

    Raises:
        UserError: drawing processes cannot work here at all.
    """
    _check_processes(size)
    jobs = [(svg, look, size, seconds) for svg, look in icons]
    pngs = [b""] * len(jobs)
    outlines = np.zeros((len(jobs), SIDE * SIDE), np.uint8)
    failures: dict[Failure, list[int]] = {}
    for number, done in enumerate(_all_done(jobs, processes)):
        if isinstance(done, str):
            failures.setdefault(done, []).append(number)
        else:
            pngs[number], outlines[number] = done
        if progress is not None and number % _CHUNK == 0:
            progress("drawing", number, len(jobs))
    return Drawings(pngs, outlines, failures)


def _check_processes(size: int) -> None:
    """Draws a square, so that processes that cannot start do not count as drawings that fail."""
    square = Svg('<rect width="16" height="16"/>', (0.0, 0.0, 16.0, 16.0))
    try:
        with _pool(1) as pool:
            pool.submit(_draw, (square, Look(4, (0, 0, 0), _WHITE), size, SECONDS)).result()
    except BrokenProcessPool:
        raise UserError(
            "drawing processes end at once: in a script of your own, call this below "
            "`if __name__ == '__main__':`; otherwise memory is short"
        ) from None


def _all_done(jobs: Sequence[_Job], processes: int) -> Iterator[_Done]:
    """The results of all jobs, in their order."""
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    finished = 0
    try:
        with _pool(processes) as pool:
            for done in pool.map(_draw_chunk, chunks):
                yield from done
                finished += 1
    except BrokenProcessPool:
        # A drawing ended its process. It is among the rest, whose jobs run one by one.
        yield from _one_by_one(jobs[finished * _CHUNK :])


def _one_by_one(jobs: Sequence[_Job]) -> Iterator[_Done]:
    remaining = list(jobs)
    while remaining:
        with _pool(1) as pool:
            try:
                while remaining:
                    yield pool.submit(_draw, remaining[0]).result()
                    remaining.pop(0)
            except BrokenProcessPool:
                remaining.pop(0)
                yield "takes too much time or memory"


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), _limit)


def _limit() -> None:
    end_with_parent()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also inside of resvg
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends this
    with contextlib.suppress(OSError):  # only Linux tells the size of the address space
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def _draw_chunk(jobs: Sequence[_Job]) -> list[_Done]:
    return [_draw(job) for job in jobs]


def _draw(job: _Job) -> _Done:
    svg, look, size, seconds = job
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        if len(svg.body) > _MAX_BODY or _OUTSIDE.search(svg.body):
            return "refers to something outside"
        rgb = draw(svg, look, size)
    except (ValueError, OSError, MemoryError):  # of resvg and Pillow
        return "cannot be drawn"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    found = outline(rgb, look.background)
    if not found.any():
        return "is empty"
    png = io.BytesIO()
    Image.fromarray(rgb).save(png, "PNG")
    return png.getvalue(), found


def draw(svg: Svg, look: Look, size: int) -> NDArray[np.uint8]:
    """Draws one icon in the middle of a square image, [size, size, 3].

    Raises:
        ValueError: it cannot be drawn.
    """
    import resvg_py

    left, top, width, height = svg.box
    longest, shortest = max(width, height), min(width, height)
    if not 0 < longest <= _MAX_ASPECT * shortest:
        raise ValueError(f"view box {width} x {height}")
    room = size - 2 * look.margin
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    shape = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
    red, green, blue = look.front
    colour = f'color="#{red:02x}{green:02x}{blue:02x}"'
    png = resvg_py.svg_to_bytes(
        svg_string=f"<svg {head} {shape} {colour}>{svg.body}</svg>",
        skip_system_fonts=True,
        dpi=_DPI,
        width=room if width >= height else None,
        height=None if width >= height else room,
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGB", (size, size), look.background)
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2), drawn)
    return np.asarray(square)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
