"""Shows an inspection as text, and as one self-contained HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from neuclip.data.tools.duplicates import duplicate_facts
from neuclip.data.tools.inspection import Inspection
from neuclip.errors import quantity
from neuclip.templates import render

_LISTED = 200  # corrupt samples on the page


@dataclass(frozen=True)
class HistogramBar:
    """One bar of a histogram.

    Attributes:
        label: the range of values.
        count: number of values in the range.
        share: count as a fraction of the longest bar.
    """

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Histogram:
    """Counts of values, in ranges that double."""

    title: str
    summary: str
    bars: list[HistogramBar]


def facts(found: Inspection, samples_per_second: float | None) -> list[tuple[str, str]]:
    """The inspection as pairs of name and value.

    Args:
        found: the inspection.
        samples_per_second: training rate, to add the duration of an epoch.
    """
    rows = [
        ("samples", f"{found.samples:,}"),
        ("blocks" if found.file_bytes is None else "shards", f"{found.blocks:,}"),
    ]
    if found.file_bytes is not None:
        rows.append(("size", in_bytes(found.file_bytes)))
    read = quantity(found.read, "sample")
    rows.append(("read", f"{read}, {found.good:,} of them without error"))
    if found.good:
        widths, heights = np.array(found.sizes).T
        rows += [
            ("images", f"median {_median(widths)} x {_median(heights)} pixels, "
                         f"shorter side {_range(np.minimum(widths, heights))}"),
            ("image files", f"{in_bytes(float(np.mean(found.image_bytes)))} on average; "
                            f"{_counts(found.formats)}; colours {_counts(found.modes)}"),
            ("captions", _captions(found)),
            *duplicate_facts(found.duplicates),
        ]  # fmt: skip
    if found.rotated:
        rows.append(("rotated", f"{found.rotated:,} with an EXIF rotation, which training ignores"))
    rows.append(("corrupt", found.damage.summary() or "none"))
    if samples_per_second is not None:
        seconds = found.epoch_seconds(samples_per_second)
        rows.append(("epoch", f"{in_time(seconds)} at {samples_per_second:,g} samples/s"))
    return rows


def _captions(found: Inspection) -> str:
    """Number and length of the captions."""
    if not found.caption_lengths:
        return "none"
    lengths, numbers = np.array(found.caption_lengths), np.array(found.caption_numbers)
    several = f"{_range(numbers)} per sample, " if numbers.min() != 1 or numbers.max() != 1 else ""
    cut = ""
    if found.truncated:
        share = found.truncated / len(lengths)
        cut = f"; {share:.1%} have more than the {found.context} tokens that CLIP reads"
    return f"{several}{_range(lengths)} characters, median {_median(lengths)}{cut}"


def page(found: Inspection, samples_per_second: float | None) -> str:
    """The inspection as an HTML page without external resources."""
    sides = [min(size) for size in found.sizes]
    histograms = [
        histogram("Shorter side", "pixels", sides),
        histogram("Image file", "bytes", found.image_bytes),
        histogram("Caption", "characters", found.caption_lengths),
    ]
    report = found.damage.report()
    return render(
        "inspect.html.j2",
        name=found.name,
        facts=facts(found, samples_per_second),
        histograms=[each for each in histograms if each is not None],
        unused=found.unused,
        damage=report,
        corrupt=report["examples"][:_LISTED],
        examples=found.examples,
        file_name=lambda path: PurePath(path).name,
    )


def histogram(title: str, unit: str, values: Sequence[int]) -> Histogram | None:
    """A histogram without empty bars at the ends; None if there are no values."""
    if not values:
        return None
    array = np.array(values)
    # Bin b counts 2^(b-1) to 2^b - 1; bin 0 counts the zeros.
    bins = np.bincount(np.ceil(np.log2(array + 1)).astype(int))
    first, longest = int(np.flatnonzero(bins)[0]), int(bins.max())
    bars = [
        HistogramBar(_bin_label(number), int(count), count / longest)
        for number, count in enumerate(bins.tolist())
        if number >= first
    ]
    summary = f"{unit}: {_range(array)}, median {_median(array)}, mean {array.mean():,.0f}"
    return Histogram(title, summary, bars)


def _bin_label(number: int) -> str:
    if number <= 1:
        return str(number)
    return f"{_short(2 ** (number - 1))} to {_short(2**number - 1)}"


def _short(value: int) -> str:
    for factor, letter in ((2**20, "M"), (2**10, "k")):
        if value >= factor:
            return f"{round(value / factor)}{letter}"
    return str(value)


def in_bytes(size: float) -> str:
    """Formats a size in bytes."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def in_time(seconds: float) -> str:
    """Formats a duration in seconds."""
    for factor, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _median(values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> str:
    return f"{np.median(values):,.0f}"


def _range(values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> str:
    least, most = int(values.min()), int(values.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _counts(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count / total:.1%}" for name, count in ordered)
