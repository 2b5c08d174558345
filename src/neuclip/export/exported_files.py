"""The files of an export, as its card lists them: an export replaces them, a push uploads them."""

import re
from dataclasses import dataclass
from pathlib import Path

from neuclip.errors import UserError, printable, quantity
from neuclip.untrusted import open_regular

CARD = "README.md"
_RECORD = re.compile(r"<!-- written by neuclip export: (.*) -->")
_CARD_BYTES = 1_000_000
_SHOWN = 5


@dataclass(frozen=True)
class ExportedFiles:
    """A folder that an export wrote, with all its files.

    Attributes:
        folder: the folder.
        card: the text of its model card.
        files: names and sizes in bytes, the card first.
        others: names of files and folders in it that the export did not write.
    """

    folder: Path
    card: str
    files: dict[str, int]
    others: list[str]


def record_of(folder: Path) -> str:
    """The line of a card that lists the files of a folder with their sizes."""
    return ", ".join(f"{path.name} {path.stat().st_size}" for path in sorted(folder.iterdir()))


def unchanged_files(folder: Path) -> set[str]:
    """The files that are as an export wrote them, by its card; empty for any other folder."""
    found = _recorded(folder)
    if found is None:
        return set()
    return {CARD} | {name for name, size in found[1].items() if _is_there(folder, name, size)}


def read_exported_files(folder: Path) -> ExportedFiles:
    """Finds what an export wrote to a folder.

    Raises:
        UserError: no export wrote it, or files are missing or changed since.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: {_MAKE_ONE}")
    found = _recorded(folder)
    if found is None:
        raise UserError(f"{folder} is not an export (no {CARD} that lists its files): {_MAKE_ONE}")
    card, sizes = found
    wrong = sorted(name for name, size in sizes.items() if not _is_there(folder, name, size))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        shown = ", ".join(printable(name) for name in wrong[:_SHOWN])
        raise UserError(
            f"{folder}: {quantity(len(wrong), 'file')} missing or changed since the export "
            f"({shown}{more}): export again, with --overwrite"
        )
    others = sorted({path.name for path in folder.iterdir()} - sizes.keys() - {CARD})
    return ExportedFiles(folder, card, {CARD: len(card.encode()), **sizes}, others)


_MAKE_ONE = "`neuclip export RUN --format hf --out FOLDER` makes an export"


def _recorded(folder: Path) -> tuple[str, dict[str, int]] | None:
    """The card, and the files that it lists with their sizes; None if it lists none."""
    try:
        with open_regular(folder / CARD) as file:
            card = file.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    found = _RECORD.findall(card)
    if not found:
        return None
    entries = (entry.rpartition(" ") for entry in found[-1].split(", "))
    return card, {name: int(size) if size.isdecimal() else -1 for name, _, size in entries}


def _is_there(folder: Path, name: str, size: int) -> bool:
    """Whether a folder itself has a regular file of this name and size, no link."""
    path = folder / name
    if path.parent != folder or name == "..":
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size
