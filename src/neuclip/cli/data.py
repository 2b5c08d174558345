"""`neuclip data inspect`, `pack` and `bench`: tools for the user's own data.

Imports neither torch nor numpy before the options are checked.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from neuclip.cli import terminal
from neuclip.cli.flag_table import settings_flags
from neuclip.cli.flag_values import checked_section
from neuclip.cli.options import check_range
from neuclip.config.data_sections import DataConfig, ReadingConfig
from neuclip.errors import quantity
from neuclip.masking import mask

if TYPE_CHECKING:
    from neuclip.data.sources.source import Captions, Source

ANNOTATIONS = ("label_key", "hard_negative_key", "pair_weight_key")
# Only training uses order and ids of samples, and annotations.
_TRAINING = {"train_data_upsampling_factors", "shuffle_window", "data_size", *ANNOTATIONS}
READING = tuple(key for key in ReadingConfig.model_fields if key not in _TRAINING)

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

    def open(self, pattern: str, captions: "Captions" = "if_any") -> "Source":
        """Opens a source; what was recognised, and what is not read, is logged.

        Args:
            pattern: as for `--train-data`.
            captions: what a missing caption is.

        Raises:
            UserError: the source cannot be opened.
        """
        config = self.data_config()
        from neuclip.data.opening import open_source

        with terminal.progress() as progress:
            return open_source(pattern, config, progress, captions=captions)


@dataclass(frozen=True, kw_only=True)
class TimedReadingFlags(ReadingFlags):
    """How data are read by data workers, and how long to wait for them."""

    reading: Annotated[
        GivenSettings, OmitArgPrefixes, settings_flags("data", (*READING, "data_timeout"))
    ] = field(default_factory=GivenSettings)


@dataclass(frozen=True, kw_only=True)
class EvaluatedReadingFlags(TimedReadingFlags):
    """How evaluation splits are read; labels are class names."""

    reading: Annotated[
        GivenSettings,
        OmitArgPrefixes,
        settings_flags("data", (*READING, "label_key", "data_timeout")),
    ] = field(default_factory=GivenSettings)


@dataclass(frozen=True, kw_only=True)
class _SourceCommand(ReadingFlags):
    """A command that reads a source."""

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """data as for `neuclip train --train-data`: shards, tables, folders; :: joins several"""


@dataclass(frozen=True, kw_only=True)
class Inspect(_SourceCommand):
    """Show sizes, captions, corrupt samples and examples of a data set."""

    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """write an HTML page with examples"""
    max_samples: int = 2000
    """number of random samples to read"""
    reading: Annotated[
        GivenSettings,
        OmitArgPrefixes,
        settings_flags("data", (*READING, *ANNOTATIONS, "max_image_pixels")),
    ] = field(default_factory=GivenSettings)
    samples_per_second: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="")
    ] = None  # fmt: skip
    """training rate, to compute the duration of an epoch"""


def inspect_data(command: Inspect) -> int:
    """Reads samples, prints the result, and writes the page.

    Raises:
        UserError: the source cannot be read, or the page cannot be written.
    """
    check_range("max-samples", command.max_samples, ge=1)
    check_range("samples-per-second", command.samples_per_second, gt=0)
    max_pixels = command.data_config().max_image_pixels
    from neuclip.data.tools.inspection import inspect
    from neuclip.data.tools.inspection_page import facts, page
    from neuclip.files import write_whole
    from neuclip.model.clip import clip_tokenizer

    source = command.open(command.source)
    try:
        with terminal.progress() as progress:
            found = inspect(
                source,
                mask(command.source),
                command.max_samples,
                max_pixels=max_pixels,
                tokenize=clip_tokenizer(),
                progress=progress,
            )
    finally:
        source.close()
    rate = command.samples_per_second
    terminal.print_facts(facts(found, rate))
    for damage in found.damage.examples[:20]:
        print(f"  {damage}")
    if command.out is not None:
        write_whole(command.out, page(found, rate))
        print(f"written to {command.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Pack(_SourceCommand):
    """Write any data set as tar shards with a manifest. If interrupted, repeat it to continue."""

    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """folder to fill"""
    shard_samples: int = 10_000
    """samples per shard"""
    workers: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: one per core)")
    ] = None
    """writing processes"""


def pack_data(command: Pack) -> int:
    """Packs, and prints the number of samples and shards.

    Raises:
        UserError: the source cannot be read, or the folder cannot be written.
    """
    check_range("shard-samples", command.shard_samples, ge=1)
    workers = command.workers if command.workers is not None else os.cpu_count() or 1
    check_range("workers", workers, ge=1)
    from neuclip.data.tools.inspection_page import in_bytes
    from neuclip.data.tools.pack import Plan, pack

    source = command.open(command.source)
    try:
        plan = Plan(mask(command.source), len(source), command.shard_samples)
        with terminal.progress() as progress:
            packed = pack(source, plan, command.out, workers=workers, progress=progress)
    finally:
        source.close()
    samples = sum(shard.samples for shard in packed.shards)
    size = in_bytes(sum(shard.size for shard in packed.shards))
    again = f"; {packed.reused:,} of them existed already" if packed.reused else ""
    shards = quantity(len(packed.shards), "shard")
    print(f"{quantity(samples, 'sample')} in {shards} ({size}){again}")
    print(f"written to {command.out}")
    if packed.several_captions:
        have = "has" if packed.several_captions == 1 else "have"
        print(
            f"{quantity(packed.several_captions, 'sample')} {have} several captions: train with "
            "--caption-key captions to read all of them"
        )
    if packed.log.total:
        print(f"left out: {packed.log.summary()}; see {command.out / 'pack_report.json'}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Bench(_SourceCommand):
    """Time reading, decoding, resizing and tokenizing to find the bottleneck."""

    model: Annotated[str, arg(metavar="NAME")] = "ViT-B-32"
    """model whose transform and tokenizer are timed"""
    samples: int = 500
    """number of random samples to time"""
    samples_per_second: float = 1000.0
    """training rate, to compute the number of workers"""
    reading: Annotated[
        GivenSettings, OmitArgPrefixes, settings_flags("data", (*READING, "full_decode"))
    ] = field(default_factory=GivenSettings)


def bench_data(command: Bench) -> int:
    """Times the stages, and prints a table and the number of workers needed.

    Raises:
        UserError: the source cannot be read, or the model is unknown.
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
    cores = os.cpu_count() or 1
    print(f"{1 / speed.total:,.0f} samples/s per core ({quantity(speed.samples, 'sample')} timed)")
    print(f"slowest stage: {speed.slowest} ({speed.seconds[speed.slowest] / speed.total:.0%})")
    needed = quantity(workers, "worker")
    print(f"{rate:,g} samples/s need {needed} with one core each (--workers {workers})")
    if workers > cores:
        few = quantity(cores, "core")
        print(f"this machine has only {few}; to speed up {speed.slowest}: {speed.advice}")
    if speed.corrupt:
        print(f"corrupt samples, not timed: {speed.corrupt}")
    return 0
