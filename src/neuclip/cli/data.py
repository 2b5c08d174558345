"""`neuclip data inspect`, `pack` and `bench`: tools for data sets of one's own.

Imports neither torch nor numpy before there is something to read.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.options import Switch
from neuclip.config.sections import DataFormat
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.data.sources.source import Source

_OPTIONAL_TEXT = arg(metavar="TEXT", help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """How data are read, with the flags of `neuclip train`."""

    data_format: DataFormat = "auto"
    """what it is; auto: told from name and content"""
    caption_key: Annotated[str | None, _OPTIONAL_TEXT] = None
    """take the caption from this key of the .json instead of from the .txt"""
    csv_img_key: Annotated[str | None, _OPTIONAL_TEXT] = None
    """column of a table with the image"""
    csv_caption_key: Annotated[str | None, _OPTIONAL_TEXT] = None
    """column of a table with the caption"""
    csv_separator: Annotated[str | None, _OPTIONAL_TEXT] = None
    """between the columns of a table"""
    cache_dir: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """folder for shards fetched from other machines"""
    cache_size_gb: float = 50.0
    """GiB of fetched shards to keep at most"""
    allow_pipe: Switch = False
    """run the shell commands that pipe: sources consist of"""

    def open(self, spec: str) -> "Source":
        """A source.

        Args:
            spec: what --train-data takes.

        Raises:
            UserError: it cannot be opened.
        """
        from neuclip.data.opening import OpenSettings, open_source
        from neuclip.data.sources.tables import Columns

        settings = OpenSettings(
            data_format=self.data_format,
            caption_key=self.caption_key,
            columns=Columns(self.csv_img_key, self.csv_caption_key, self.csv_separator),
            cache_dir=self.cache_dir,
            cache_size_gb=self.cache_size_gb,
            allow_pipe=self.allow_pipe,
        )
        with terminal.progress() as progress:
            advance = progress and (lambda done, total: progress("indexing", done, total))
            return open_source(spec, settings, advance)


@dataclass(frozen=True, kw_only=True)
class _Reading(ReadingFlags):
    """What is read."""

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """what --train-data takes: shards, tables, folders; several joined by ::"""


@dataclass(frozen=True, kw_only=True)
class Inspect(_Reading):
    """Show what data hold: samples, sizes, captions, damage, and examples on an HTML page."""

    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """write a page with example pictures"""
    max_samples: int = 2000
    """samples to read and decode, drawn at random"""
    max_image_pixels: int = 178_956_970
    """a picture of more pixels counts as damaged"""
    samples_per_second: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="")
    ] = None  # fmt: skip
    """rate of training, to tell how long an epoch takes"""


def inspect_data(command: Inspect) -> int:
    """Looks, prints, and writes the page.

    Raises:
        UserError: the source cannot be read, or the page not written.
    """
    _at_least("max-samples", command.max_samples, 1)
    _at_least("max-image-pixels", command.max_image_pixels, 1)
    _check_rate(command.samples_per_second)
    from neuclip.data.tools.inspection import inspect
    from neuclip.data.tools.inspection_page import facts, page
    from neuclip.files import write_whole

    source = command.open(command.source)
    try:
        with terminal.progress() as progress:
            found = inspect(
                source,
                command.source,
                command.max_samples,
                max_pixels=command.max_image_pixels,
                progress=progress,
            )
    finally:
        source.close()
    rate = command.samples_per_second
    terminal.print_facts(facts(found, rate))
    for damage in found.damage.report()["examples"][:20]:
        where = f"{damage['shard']}, {damage['key']}" if damage["key"] else damage["shard"]
        print(f"  {damage['kind']}: {where}: {damage['detail']}")
    if command.out is not None:
        write_whole(command.out, page(found, rate))
        print(f"written to {command.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Pack(_Reading):
    """Write any data as tar shards with a manifest; the same command continues after a kill."""

    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """folder to fill"""
    shard_samples: int = 10_000
    """samples in a shard"""
    workers: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: one per core)")
    ] = None
    """processes that write, each a shard of its own"""


def pack_data(command: Pack) -> int:
    """Packs, and prints what was made.

    Raises:
        UserError: the source cannot be read, or the folder not written.
    """
    _at_least("shard-samples", command.shard_samples, 1)
    workers = command.workers if command.workers is not None else os.cpu_count() or 1
    _at_least("workers", workers, 1)
    from neuclip.data.tools.inspection_page import in_bytes
    from neuclip.data.tools.pack import Plan, pack

    source = command.open(command.source)
    try:
        plan = Plan(command.source, len(source), command.shard_samples)
        with terminal.progress() as progress:
            packed = pack(source, plan, command.out, workers=workers, progress=progress)
    finally:
        source.close()
    samples = sum(shard.samples for shard in packed.shards)
    size = in_bytes(sum(shard.size for shard in packed.shards))
    again = f", {packed.reused} of them were there already" if packed.reused else ""
    print(f"{samples:,} samples in {len(packed.shards):,} shards ({size}) in {command.out}{again}")
    if packed.log.total:
        print(f"left out: {packed.log.summary()}; see {command.out / 'pack_report.json'}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Bench(_Reading):
    """Time reading, decoding, resizing and tokenizing, and say what limits."""

    model: Annotated[str, arg(metavar="NAME")] = "ViT-B-32"
    """whose transform and tokenizer to use"""
    samples: int = 500
    """samples to time, drawn at random"""
    samples_per_second: float = 1000.0
    """what the model takes, to tell how many workers feed it"""
    full_decode: Switch = False
    """decode every JPEG at full scale"""


def bench_data(command: Bench) -> int:
    """Times the stages, and prints a table and the verdict.

    Raises:
        UserError: the source cannot be read, or there is no such model.
    """
    _at_least("samples", command.samples, 1)
    _check_rate(command.samples_per_second)
    import torch

    from neuclip.data.decode import ImageDecoder
    from neuclip.data.tools.bench import Stages, bench
    from neuclip.model.clip import build_clip

    clip = build_clip(command.model, "fp32", torch.device("cpu"))
    decode = ImageDecoder.for_model(clip.image_size, full=command.full_decode)
    source = command.open(command.source)
    try:
        stages = Stages(decode, clip.train_transform, clip.tokenize)
        speed = bench(source, stages, command.samples)
    finally:
        source.close()
    terminal.print_stages(speed.seconds)
    rate, workers = command.samples_per_second, speed.workers(command.samples_per_second)
    print(f"{1 / speed.total:,.0f} samples/s per core ({speed.samples:,} samples timed)")
    print(f"{speed.limit} takes longest ({speed.seconds[speed.limit] / speed.total:.0%})")
    print(f"{rate:,g} samples/s need {workers} workers with a core each (--workers {workers})")
    if workers > (os.cpu_count() or 1):
        print(f"this machine has {os.cpu_count()} cores: they would limit; {speed.advice}")
    if speed.damaged:
        print(f"damaged and not timed: {speed.damaged}")
    return 0


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{flag}: {value} is out of range; it must be >= {least}")


def _check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate < float("inf"):
        raise UserError(f"--samples-per-second: {rate:g} is out of range; it must be > 0")
