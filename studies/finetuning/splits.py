"""The splits of the study: emoji, where models are tuned, and icons, which they knew before."""

from pathlib import Path

SPLITS = ("unseen_vendor", "unseen_emoji")
KNOWN = "unseen_style_development"
"""The split of the icons that shows what a run forgets."""


def emoji_splits(emoji: Path, part: str) -> list[Path]:
    """The folders of a part's splits.

    Args:
        emoji: of `neuclip data emoji`.
        part: `development` or `test`.
    """
    return [emoji / f"{split}_{part}" for split in SPLITS]
