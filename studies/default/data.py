"""The data of the study: the embedded glyphs in their first version, which later ones replaced."""

import hashlib
import json
from pathlib import Path

from neuclip.errors import UserError

SPLITS = ("unseen_face", "unseen_character")
COMMIT = "0e08d96"
"""A version of this repository whose `neuclip data demo` builds these data."""


def data_digest(data: Path) -> str:
    """A digest of the embedded data's description, which names every shard's size and font.

    Raises:
        UserError: the folder has no embedded data, or those of a later version.
    """
    path = data / "demo.json"
    build = f"build the first version with `git checkout {COMMIT}; neuclip data demo --out {data}`"
    if not path.is_file():
        raise UserError(f"--data {data}: no embedded data (demo.json is missing); {build}")
    if not all((data / split).is_dir() for split in SPLITS):
        version = json.loads(path.read_text(encoding="utf-8"))["settings"]["format"]
        raise UserError(
            f"--data {data}: embedded data of format {version}, without the split {SPLITS[0]}, "
            f"which this study reads; {build}"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
