"""`neuclip data icons` and `data emoji`: image-text pairs from packages of drawings.

Imports neither torch nor numpy before the options are checked.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.options import check_range


@dataclass(frozen=True, kw_only=True)
class _PairsCommand:
    """A command that builds pairs from packages."""

    packages: Annotated[Positional[Path], arg(metavar="PACKAGES", help_behavior_hint="")]
    """folder with the tarballs that `npm pack` writes"""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """folder to create"""
    size: int = 64
    """width and height of the images in pixels"""
    seed: int = 0
    """decides looks, captions, what is held out, and the order"""
    processes: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: one per core)")
    ] = None
    """drawing processes"""

    def checked_processes(self) -> int:
        """The number of drawing processes.

        Raises:
            UserError: an option is out of range.
        """
        check_range("size", self.size, ge=32)
        processes = self.processes if self.processes is not None else os.cpu_count() or 1
        check_range("processes", processes, ge=1)
        return processes


@dataclass(frozen=True, kw_only=True)
class Icons(_PairsCommand):
    """Build image-text pairs from some 170 open icon sets.

    Fill the folder PACKAGES first, with npm:

        npm pack @iconify/json lucide-static @tabler/icons ionicons @primer/octicons healthicons

    Only the first is needed; the others add search terms to the captions. Drawing needs resvg: pip
    install 'neuclip[icons]'. The same packages and options give the same bytes.
    """

    max_pairs: int = 150_000
    """training pairs at most"""
    concepts: int = 800
    """concepts in each of the two splits of unseen concepts"""


@dataclass(frozen=True, kw_only=True)
class EmojiPairs(_PairsCommand):
    """Build image-text pairs from the emoji of a dozen vendors.

    Fill the folder PACKAGES first, with npm:

        npm pack @iconify/json emojibase-data

    Drawing needs resvg: pip install 'neuclip[icons]'. The same packages and options give the same
    bytes.
    """

    emoji: int = 150
    """emoji in each of the two splits of unseen emoji"""


def build_icon_pairs(command: Icons) -> int:
    """Builds the data set of icons, and prints its splits.

    Raises:
        UserError: an option is out of range, a package is missing or damaged, or the folder cannot
            be written.
    """
    processes = command.checked_processes()
    check_range("max-pairs", command.max_pairs, ge=1)
    check_range("concepts", command.concepts, ge=1)
    from neuclip.data.icons.icon_sets import IconSettings, build_icons

    settings = IconSettings(command.size, command.seed, command.max_pairs, command.concepts)
    with terminal.progress() as progress:
        facts = build_icons(
            command.packages, command.out, settings, processes=processes, progress=progress
        )
    _show(facts, command.out)
    return 0


def build_emoji_pairs(command: EmojiPairs) -> int:
    """Builds the data set of emoji, and prints its splits.

    Raises:
        UserError: as for icons.
    """
    processes = command.checked_processes()
    check_range("emoji", command.emoji, ge=1)
    from neuclip.data.icons.emoji_sets import EmojiSettings, build_emoji

    settings = EmojiSettings(command.size, command.seed, command.emoji)
    with terminal.progress() as progress:
        facts = build_emoji(
            command.packages, command.out, settings, processes=processes, progress=progress
        )
    _show(facts, command.out)
    return 0


def _show(facts: Mapping[str, Any], out: Path) -> None:
    """Prints a table of the splits."""
    print(f"{'split':28} {'pairs':>8} {'concepts':>9} {'sets':>5}  without learning")
    for name, split in facts["splits"].items():
        floor = split.get("floor_top1")
        said = "" if floor is None else f"{floor:.1%} top-1"
        row = f"{name:28} {split['pairs']:8,} {split['concepts']:9,} {split['sets']:5}  {said}"
        print(row.rstrip())
    repeated, pairs = (facts["splits"]["train"][key] for key in ("repeated_captions", "pairs"))
    print(f"{repeated / pairs:.0%} of the training pairs share their caption with another one")
    for reason, number in facts["not_drawn"].items():
        print(f"left out: {number:,} {'drawing' if number == 1 else 'drawings'}: {reason}")
    print(f"written to {out}; authors and licences in {out / 'CREDITS.md'}")
