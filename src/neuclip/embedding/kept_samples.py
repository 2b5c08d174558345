"""Lists of the samples that a filter keeps: keys in a text file, or uids as DataComp's tools read.

DataComp's `resharder.py --subset-file` takes a sorted `.npy` array of dtype "u8,u8": the upper and
the lower half of each 128-bit uid.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neuclip.data.samples import SampleError
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, printable, quantity
from neuclip.files import replacing, write_whole, writing

_UID = re.compile(r"[0-9a-fA-F]{32}")


def check_kept_path(path: Path) -> None:
    """Checks the ending before the work is done.

    Raises:
        UserError: it is neither .txt nor .npy.
    """
    if path.suffix not in {".txt", ".npy"}:
        raise UserError(
            f"--save-path {path}: .txt writes the kept keys, .npy the uids for DataComp's resharder"
        )


def write_kept(path: Path, keys: Sequence[str], all_keys: Sequence[str]) -> None:
    """Writes keys to a `.txt` file, or uids to a `.npy` file.

    Args:
        path: the file.
        keys: keys or uids of the kept samples.
        all_keys: those of all samples, among which a kept key must be unique.

    Raises:
        UserError: a key is not a uid, or names several samples; or the file cannot be written.
    """
    if path.suffix == ".npy":
        bad = next((key for key in keys if not _UID.fullmatch(key)), None)
        if bad is not None:
            raise UserError(
                f"--save-path {path}: {printable(bad)!r} is not a uid of 32 hexadecimal digits: "
                "--uid-key KEY reads them from the .json of the samples (DataComp's are in 'uid'); "
                "a .txt file takes any keys"
            )
    repeated = Counter(all_keys)
    twice = next((key for key in keys if repeated[key] > 1), None)
    if twice is not None:
        raise UserError(
            f"--save-path {path}: {quantity(repeated[twice], 'sample')} have the key "
            f"{printable(twice)!r}: kept keys would not tell them apart; --uid-key KEY takes "
            "another key, from the .json of the samples"
        )
    if path.suffix == ".txt":
        write_whole(path, "".join(f"{key}\n" for key in keys))
        return
    halves = [(int(key[:16], 16), int(key[16:], 16)) for key in keys]
    uids = np.array(halves, np.dtype("u8,u8"))
    uids.sort()
    with writing(path), replacing(path) as file:
        np.save(file, uids, allow_pickle=False)


def read_uids(source: Source, positions: Sequence[int]) -> list[str]:
    """The uids of samples: the labels of a source that was opened with their key as label key.

    Raises:
        UserError: a sample has none.
    """
    uids: list[str] = []
    for position in positions:
        try:
            uid = source.texts(position).annotations.label
        except SampleError as error:
            raise UserError(f"--uid-key: {error}") from None
        if not uid:
            where, key = source.locate(position)
            raise UserError(f"--uid-key: {where}, sample {printable(key)} has no uid")
        uids.append(uid)
    return uids
