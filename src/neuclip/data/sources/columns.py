"""Which columns of a table hold images and captions, and which folder image paths are relative to.

Everything is decided when a table is opened, so that a mistake costs no sample.
"""

import base64
import binascii
import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys, MissingKeyError
from neuclip.data.sources.source import Captions, Strings
from neuclip.errors import UserError, printable
from neuclip.first_bytes import describe

_log = logging.getLogger("neuclip")

IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "img", "jpg", "png", "webp", "path", "file", "file_name",
    "filename", "image_name",
)  # fmt: skip
CAPTION_COLUMNS = ("title", "caption", "text", "txt", "captions", "comment")

_CHECKED = 100  # paths looked for, spread over the table
_LOOKED_AT = 100_000  # paths compared with the folder that they are relative to
_NEAR = 50  # folders near a table
_SHOWN = 12  # columns in a message
_SHORTEST = 64  # characters of an image file as base64 text


@dataclass(frozen=True)
class ColumnIndices:
    """The columns that are read.

    Attributes:
        image: index of the image column.
        captions: indices of the caption columns; a sample has the captions of all of them.
        annotations: indices of the columns of `AnnotationKeys.names`, in their order.
    """

    image: int
    captions: tuple[int, ...]
    annotations: tuple[int, ...] = ()


def find_columns(
    names: Sequence[str], reading: ReadingConfig, where: Path, captions: Captions = "required"
) -> ColumnIndices:
    """The columns of images and of captions.

    Args:
        names: columns of the table, in order.
        reading: may name the columns, caption columns joined by commas; otherwise the first of the
            known names is taken, in any case. Names the columns of annotations.
        where: the table, for messages.
        captions: whether a table without captions is accepted.

    Raises:
        UserError: there is no such column; the message lists the existing ones.
    """
    image = _find(names, reading.csv_img_key, IMAGE_COLUMNS)
    if image is None:
        raise _no_column("image", names, reading.csv_img_key, where)
    wanted = reading.csv_caption_key or _first_of_caption_key(names, reading, where)
    keys = [wanted] if wanted is None or _find(names, wanted, ()) is not None else wanted.split(",")
    if reading.caption_keys is not None:
        drawn = reading.caption_keys_read
        wanted, keys = reading.caption_keys, list(drawn.names if drawn else ())
    found = [_find(names, key and key.strip(), CAPTION_COLUMNS) for key in keys]
    present = tuple(index for index in found if index is not None)
    if len(present) < len(found) and (wanted is not None or captions == "required"):
        missing = next(key for key, index in zip(keys, found, strict=True) if index is None)
        raise _no_column("caption", names, missing, where)
    return ColumnIndices(image, present, _annotation_columns(names, reading, where))


def _first_of_caption_key(names: Sequence[str], reading: ReadingConfig, where: Path) -> str | None:
    """The caption column that `--caption-key` names; none if it names no column.

    It is for `.json` files, and serves tables that are mixed with them by columns of these names.

    Raises:
        UserError: several columns would be drawn from.
    """
    if reading.caption_keys is not None or not reading.caption_key:
        return None
    keys = reading.caption_keys_read
    present = [key for key in keys.names if _find(names, key, ()) is not None] if keys else []
    if len(present) > 1:
        raise UserError(
            f"{where}: --caption-key {reading.caption_key} names {len(present)} columns of a "
            f"table, and only .json files take the first with a caption: name one, or draw from "
            f"them with --caption-keys {','.join(present)}"
        )
    return present[0] if present else None


def _annotation_columns(
    names: Sequence[str], reading: ReadingConfig, where: Path
) -> tuple[int, ...]:
    """The columns of `AnnotationKeys.names`; raises `MissingKeyError` if one does not exist."""
    found: dict[str, int] = {}
    for flag, key in AnnotationKeys.of(reading).by_flag.items():
        index = _find(names, key, ())
        if index is None:
            raise MissingKeyError(
                f"{where}: no column {key!r} for {flag}; its columns are {_shown_names(names)}: "
                "name one of them, or leave the flag out"
            )
        found[key] = index
    return tuple(found.values())


def columns_note(images: Sequence[str], captions: Sequence[str], reading: ReadingConfig) -> str:
    """The columns that are read, in words; says so if `--caption-key` names another one."""
    words = f"images from column {_quoted(images)}, "
    words += f"captions from {_quoted(captions)}" if captions else "no captions"
    key, known = reading.caption_key, {name.casefold() for name in captions}
    if key and not reading.caption_keys and known.isdisjoint(key.casefold().split(";")):
        words += f" ('{printable(key, 40)}' of --caption-key is for .json files)"
    return words


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{printable(name, 40)}'" for name in names)


def _shown_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return _quoted(names[:_SHOWN]) + more


def _find(names: Sequence[str], wanted: str | None, known: Sequence[str]) -> int | None:
    """The index of the wanted column, or of the first of the known ones."""
    if wanted is not None and wanted in names:
        return names.index(wanted)
    plain = [name.strip().lower() for name in names]
    candidates = known if wanted is None else (wanted.strip().lower(),)
    return next((plain.index(name) for name in candidates if name in plain), None)


def _no_column(what: str, names: Sequence[str], wanted: str | None, where: Path) -> UserError:
    known, flag = IMAGE_COLUMNS, "--csv-img-key"
    if what == "caption":
        known, flag = CAPTION_COLUMNS, "--csv-caption-key"
    lacks = f"none of the columns {', '.join(known)}" if wanted is None else f"no column {wanted!r}"
    shown = _shown_names(names)
    remedy = f"name one with {flag} (and the separator with --csv-separator if these look joined)"
    if what == "image" and any(name.strip().lower() in {"url", "image_url"} for name in names):
        remedy = f"the images are {DOWNLOAD}; if another column holds paths, name it with {flag}"
    elif {"images", "annotations"} <= set(names):
        return UserError(
            f"{where} holds annotations as COCO writes them: write one line an image, as in "
            '{"file_name": "1.jpg", "caption": ["a cat", "a grey cat"]} (docs/data.md has the code)'
        )
    elif any(name.startswith(("http://", "https://")) for name in names):
        remedy = f"the first line must hold the names of the columns; the images are {DOWNLOAD}"
    return UserError(f"{where}: {lacks} for the {what}; its columns are {shown}: {remedy}")


DOWNLOAD = (
    "addresses: download them first, for example with img2dataset --output_format webdataset, and "
    "give its output folder"
)


def image_root(table: Path, images: Strings) -> Path:
    """The folder that the image paths of a table are relative to.

    It is the table's folder or the current folder, whichever has more of a hundred images, spread
    over the table. If neither has any, it is the folder inside or beside the table's folder that
    has them, as in Flickr8k (`captions.txt` beside `Images/`); a log line names it.
    Another one says how many paths lead out of the folder.

    Args:
        table: the table.
        images: the image paths.

    Raises:
        UserError: no such folder has any of them, or several have equally many; the message says
            what the paths are and where they were looked for.
    """
    root = _root_of(table, images)
    _report_outside(table, root, images)
    return root


def _report_outside(table: Path, root: Path, images: Strings) -> None:
    """Logs how many image paths lead out of the root: a table of somebody else may name any file.

    At most a hundred thousand paths are looked at, spread over the table.
    """
    step = -(-len(images) // _LOOKED_AT) or 1
    inside = f"{os.path.abspath(root)}{os.sep}"  # noqa: PTH100  links are not followed
    looked, outside, example = 0, 0, ""
    for row in range(0, len(images), step):
        looked += 1
        name = images[row]
        if name[:1] != os.sep and ".." not in name:
            continue
        if not os.path.normpath(inside + name if name[:1] != os.sep else name).startswith(inside):
            outside, example = outside + 1, example or name
    if outside:
        _log.info(
            "%s: %s of %s image paths lead out of %s, such as %s",
            table, f"{outside:,}", f"{looked:,}", root, printable(example, 200),
        )  # fmt: skip


def _root_of(table: Path, images: Strings) -> Path:
    """The folder that the image paths are relative to; see `image_root`."""
    step = max(1, len(images) // _CHECKED)
    names = [images[row] for row in range(0, len(images), step)]
    names = [name for name in names if name.strip()]
    if not names:
        return table.parent
    _check_paths(table, names)
    roots = [table.parent]
    if Path.cwd() != table.parent.resolve() and not all(map(os.path.isabs, names)):
        roots.append(Path.cwd())
    found = _counts(roots, names)
    if any(found):
        return roots[found.index(max(found))]
    near = [] if "\\" in names[0] else _folders_near(table)
    found = _counts(near, names)
    best = [root for root, count in zip(near, found, strict=True) if 0 < count == max(found)]
    first = printable(names[0])
    if len(best) > 1:
        raise UserError(
            f"{table}: images such as '{first}' exist in {' and in '.join(map(str, best[:3]))}: "
            "start in the folder that the paths are relative to"
        )
    if best:
        _log.info("%s: image paths are relative to %s", table, best[0])
        return best[0]
    places = " and in the current folder ".join(map(str, roots))
    slashes = "; they contain backslashes, which must be /" if "\\" in names[0] else ""
    raise UserError(
        f"{table}: none of the {len(names)} image paths tried exists; the first is '{first}', "
        f"looked for in {places}{slashes}: paths must be absolute, or relative to one of these "
        "folders"
    )


def _counts(roots: Iterable[Path], names: Sequence[str]) -> list[int]:
    """How many of the images each folder has."""
    return [sum(os.path.isfile(root / name) for name in names) for root in roots]  # noqa: PTH113


def _folders_near(table: Path) -> list[Path]:
    """Folders inside and beside the folder of a table, some at most."""
    folder = table.resolve().parent
    near: list[Path] = []
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError):
            names = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
            near += [place / name for name in names[:_NEAR] if place / name != folder]
    return near if table.is_absolute() else [Path(os.path.relpath(path)) for path in near]


def _check_paths(table: Path, names: Sequence[str]) -> None:
    """Raises `UserError` for values that are addresses or images instead of paths."""
    first = names[0]
    if first.startswith(("http://", "https://", "s3://", "gs://")):
        raise UserError(f"{table}: the image column holds {DOWNLOAD} (first: {printable(first)})")
    kind = base64_image(first)
    if kind is not None:
        raise UserError(
            f"{table}: the image column holds images as base64 text ({kind}), which is read from "
            "parquet tables only: convert the table to parquet, or write the images as files"
        )


def base64_image(text: str) -> str | None:
    """What image a text is in base64, for example "a PNG image"; None if it is none."""
    if len(text) < _SHORTEST:
        return None
    try:
        kind = describe(base64.b64decode(text[:64], validate=True))
    except (binascii.Error, ValueError):
        return None
    return kind if kind is not None and kind.endswith("image") else None
