"""`neuclip data inspect`, `pack` and `bench`: tools for data sets of one's own.

Imports neither torch nor numpy before there is something to read.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from neuclip.cli import terminal
from neuclip.cli.flag_table import settings_flags
from neuclip.cli.options import check_range
from neuclip.cli.train import checked_section
from neuclip.config.sections import DataConfig, ReadingConfig

if TYPE_CHECKING:
    from neuclip.data.sources.source import Source

READING = tuple(
    key
    for key in ReadingConfig.model_fields
    # They decide order and ids of samples, which only training uses.
    if key not in {"train_data_upsampling_factors", "shuffle_window", "data_size"}
)

GivenSettings = dict[str, Any]
"""Values of the flags given, by setting of the `data` section."""


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """How data are read, with the flags of `neuclip train`."""

    reading: Annotated[GivenSettings, OmitArgPrefixes, settings_flags("data", READING)] = field(
        default_factory=GivenSettings
    )

    def data_config(self) -> DataConfig:
        """The flags over the defaults.

        Raises:
            UserError: a value is out of range.
        """
        return checked_section("data", self.reading)

    def open(self, pattern: str) -> "Source":
        """Opens a source.

        Args:
            pattern: as for `--train-data`.

        Raises:
            UserError: the source cannot be opened.
        """
        config = self.data_config()
        from neuclip.data.opening import open_source

        with terminal.progress() as progress:
            advance = progress and (lambda done, total: progress("indexing", done, total))
            return open_source(pattern, config, advance)


@dataclass(frozen=True, kw_only=True)
class _SourceCommand(ReadingFlags):
    """What is read."""

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """data as for `neuclip train --train-data`: shards, tables, folders; :: joins several"""


@dataclass(frozen=True, kw_only=True)
class Inspect(_SourceCommand):
    """Show what data hold: samples, sizes, captions, damage, and examples on an HTML page."""

    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """write a page with example pictures"""
    max_samples: int = 2000
    """samples to read and decode, drawn at random"""
    reading: Annotated[
        GivenSettings, OmitArgPrefixes, settings_flags("data", (*READING, "max_image_pixels"))
    ] = field(default_factory=GivenSettings)
    samples_per_second: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="")
    ] = None  # fmt: skip
    """rate of training, to tell how long an epoch takes"""


def inspect_data(command: Inspect) -> int:
    """Looks, prints, and writes the page.

    Raises:
        UserError: the source cannot be read, or the page not written.
    """
    check_range("max-samples", command.max_samples, ge=1)
    check_range("samples-per-second", command.samples_per_second, gt=0)
    max_pixels = command.data_config().max_image_pixels
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
                max_pixels=max_pixels,
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
class Pack(_SourceCommand):
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
    check_range("shard-samples", command.shard_samples, ge=1)
    workers = command.workers if command.workers is not None else os.cpu_count() or 1
    check_range("workers", workers, ge=1)
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
class Bench(_SourceCommand):
    """Time reading, decoding, resizing and tokenizing, and say what limits."""

    model: Annotated[str, arg(metavar="NAME")] = "ViT-B-32"
    """whose transform and tokenizer to use"""
    samples: int = 500
    """samples to time, drawn at random"""
    samples_per_second: float = 1000.0
    """what the model takes, to tell how many workers feed it"""
    reading: Annotated[
        GivenSettings, OmitArgPrefixes, settings_flags("data", (*READING, "full_decode"))
    ] = field(default_factory=GivenSettings)


def bench_data(command: Bench) -> int:
    """Times the stages, and prints a table and the verdict.

    Raises:
        UserError: the source cannot be read, or there is no such model.
    """
    check_range("samples", command.samples, ge=1)
    check_range("samples-per-second", command.samples_per_second, gt=0)
    full_decode = command.data_config().full_decode
    import torch

    from neuclip.data.decode import ImageDecoder
    from neuclip.data.tools.bench import Stages, bench
    from neuclip.model.clip import build_clip

    clip = build_clip(command.model, "fp32", torch.device("cpu"))
    decode = ImageDecoder.for_model(clip.image_size, full=full_decode)
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
