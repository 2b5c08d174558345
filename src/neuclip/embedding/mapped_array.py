"""The rows of a `.npy` file, memory-mapped: the operating system reads what is used."""

import mmap
from pathlib import Path
from typing import cast

import numpy as np
from numpy.lib import format as npy

from neuclip.embedding.shard_files import Rows
from neuclip.errors import UserError
from neuclip.untrusted import open_regular

_KINDS = ("<f4", "<f2")


class MappedArray:
    """A matrix of float32 or float16 on disk.

    Its files are replaced, never changed, by all that write embeddings, and a replaced file stays
    mapped. Only a file that is cut in place is lost: to read beyond its end would end the process.

    Args:
        path: the file, as `numpy.save` writes it.

    Attributes:
        rows: the matrix [rows, dim]; what is written to it does not reach the file.

    Raises:
        OSError: the file cannot be mapped.
        ValueError: it holds anything else, or is too short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_regular(path) as file:
            npy.read_magic(file)
            (rows, dim), in_columns, kind = npy.read_array_header_1_0(file)
            start = file.tell()
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if in_columns or kind.str not in _KINDS or min(rows, dim) < 0:
            raise ValueError("not rows of float32 or float16")
        self._end = start + rows * dim * kind.itemsize
        if self._map.size() < self._end:
            raise ValueError("the file is too short")
        whole = np.ndarray((rows, dim), kind, self._map, start)
        self.rows = cast("Rows", whole)

    def check(self) -> None:
        """Checks that the file is as long as ever.

        Raises:
            UserError: it was cut.
        """
        if self._map.size() < self._end:
            raise UserError(f"{self._path} was cut while in use: start again")
