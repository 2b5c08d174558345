"""What a source is, by its names and first bytes, before it is opened.

One rule for everything that is read: training and evaluation data, and the sources of
`neuclip data` and `neuclip search`.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tarfile import ReadError

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.folder_contents import (
    TRAINING_SPLITS,
    WORDS,
    Kind,
    Recognised,
    ending_of,
    in_folder,
    split_by_name,
)
from neuclip.data.patterns import expand_braces
from neuclip.data.remote.transport import PIPE
from neuclip.data.sources.columns import DOWNLOAD
from neuclip.data.sources.synthetic import SYNTHETIC
from neuclip.data.sources.tar_headers import BLOCK, parse_header
from neuclip.errors import UserError, printable
from neuclip.first_bytes import describe, first_bytes

_LOOKED_INTO = 3  # files of a pattern
_EXPECTED = (
    "tar shards, a csv, tsv, jsonl or parquet table, a folder of images, or a dataset folder of "
    "save_to_disk"
)
_DATASET = ": give the folder that save_to_disk wrote, with its state.json"


def recognise(
    part: str, reading: ReadingConfig, splits: Sequence[str] = TRAINING_SPLITS
) -> Recognised:
    """Recognises one source.

    Args:
        part: a path, a pattern with braces, an address, a `pipe:` command or `synthetic:N`.
        reading: may name the format, and allows `pipe:`.
        splits: names of splits; of a folder with several, the first that it has is read.

    Raises:
        UserError: the source does not exist or cannot be read; the message says what it is.
    """
    if part.startswith(SYNTHETIC):
        return Recognised("synthetic", part, (part,))
    if part.startswith(PIPE) and not reading.allow_pipe:
        raise UserError(f"{part!r} runs a shell command: allow it with --allow-pipe")
    if part.startswith(PIPE) or "://" in part:
        ending = os.path.splitext(part)[1].lower()  # noqa: PTH122  an address
        if reading.data_format not in {"auto", "webdataset"} or ending in {".csv", ".parquet"}:
            raise UserError(
                f"{part!r}: only tar shards can be read remotely: copy the data to a local disk"
            )
        return Recognised("remote", part, tuple(expand_braces(part)))
    paths = [Path(name).expanduser() for name in expand_braces(part)]
    given: Kind | None = None if reading.data_format == "auto" else reading.data_format
    if len(paths) == 1 and not paths[0].exists():
        found = split_by_name(part, paths[0], given)
        if found is not None:
            return found
    if any(path.is_dir() for path in paths):
        return _joined(
            part,
            [
                in_folder(path, splits, given) if path.is_dir() else _file(path, given)
                for path in paths
            ],
        )
    kind = given or _kind_of_files(paths)
    # A missing shard is reported with the pattern and the number of others.
    names = (part,) if kind == "webdataset" else tuple(str(_existing(path)) for path in paths)
    return Recognised(kind, part, names)


def _joined(part: str, found: Sequence[Recognised]) -> Recognised:
    """Several folders of a pattern as one source."""
    kinds = sorted({WORDS[each.kind] for each in found})
    if len(kinds) > 1:
        raise UserError(f"{part}: folders of different kinds ({', '.join(kinds)}): join them by ::")
    return Recognised(
        found[0].kind,
        part,
        tuple(path for each in found for path in each.paths),
        found[0].split,
        tuple(line for each in found for line in each.unused),
    )


def _file(path: Path, given: Kind | None) -> Recognised:
    name = str(_existing(path))
    return Recognised(given or _kind_of_files([path]), name, (name,))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise _missing(path)
    return path


def _missing(path: Path) -> UserError:
    hint = ""
    if not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists():
        hint = f"; a data set of the hub: hf download {path} --repo-type dataset --local-dir DIR"
    return UserError(f"{path}: no such file or folder{hint}")


# a file ------------------------------------------------------------------------------------------


def _kind_of_files(paths: Sequence[Path]) -> Kind:
    """The kind of the files of a pattern, by their ending and the first bytes of some.

    A damaged shard among others is counted when it is read. It is an error here if all files are
    something else.
    """
    kind = ending_of(paths[0])
    existing = [path for path in paths if path.is_file()][:_LOOKED_INTO]
    if not existing:
        if kind is None and not paths[0].exists():
            raise _missing(paths[0])
        return kind or "webdataset"
    heads = [first_bytes(path) for path in existing]
    if kind == "webdataset":
        if not any(_is_tar(head) for head in heads):
            _refuse(existing[0], heads[0], unless={"an empty file"})
        return kind
    found = _kind_of_content(existing[0], heads[0], kind)
    if found is None:
        _refuse(existing[0], heads[0])
        raise UserError(f"{existing[0]} is of an unknown kind: expected {_EXPECTED}")
    return found


def _kind_of_content(path: Path, head: bytes, by_ending: Kind | None) -> Kind | None:
    """The kind of a file other than `.tar`; its content counts more than its ending."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x1f\x8b") and by_ending in {"csv", "jsonl"}:
        return by_ending
    if _is_tar(head):
        return "webdataset"
    if describe(head) is not None:
        return None
    if by_ending is not None:
        return by_ending
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"{" or (text[:1] == b"[" and path.suffix.lower() == ".json"):
        return "jsonl"
    first = text.splitlines()[0] if text else b""
    return "csv" if b"\t" in first or b"," in first else None


def _refuse(path: Path, head: bytes, unless: Iterable[str] = ()) -> None:
    """Raises `UserError` for a file that is something else, with what it is and what to do."""
    what = describe(head)
    if what is not None and what not in unless:
        more = "; give its folder" if what.endswith("image") else ""
        more = _DATASET if "Arrow" in what else more
        raise UserError(f"{path} is {what}{more}; expected {_EXPECTED}")
    lines = head.decode("utf-8", "replace").splitlines() or [""]
    if lines[0].startswith(("http://", "https://")):
        raise UserError(f"{path} is a list of {DOWNLOAD} (first: {printable(lines[0])})")


def _is_tar(head: bytes) -> bool:
    """Whether a file begins with the header of a tar member, also of the old kind without magic."""
    if describe(head) == "a tar file":
        return True
    try:
        parse_header(head[:BLOCK])
    except ReadError:
        return False
    return True
