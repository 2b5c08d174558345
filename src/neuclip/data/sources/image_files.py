"""Paths of image files, and the key of each, by which tables, messages and results name it."""

from collections import Counter
from collections.abc import Iterable

from neuclip.data.sources.source import Texts


class ImageFiles:
    """Paths of image files in order, as compact as `Texts`.

    The key of a file is its path without the ending. The ending stays where the keys of two files
    would be equal: of `cat.jpg` and `cat.png`, and of `cat.jpg.png` beside them.
    """

    def __init__(self) -> None:
        self._paths = Texts()
        self._whole: set[int] = set()  # positions whose key has the ending

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> str:
        return self._paths[position]

    def extend(self, names: Iterable[str], below: str = "") -> None:
        """Adds files, all that a folder holds.

        Args:
            names: of the files, each with an ending.
            below: what their paths begin with.
        """
        names = list(names)
        known, stems = set(names), Counter(map(_stem, names))
        for name in names:
            stem = _stem(name)
            if stems[stem] > 1 or stem in known:
                self._whole.add(len(self._paths))
            self._paths.append(below + name)

    def key(self, position: int) -> str:
        """The key of a file; other bytes than UTF-8 are escaped."""
        path = self._paths[position]
        key = path if position in self._whole else _stem(path)
        return key.encode("utf-8", "backslashreplace").decode()


def _stem(path: str) -> str:
    return path.rpartition(".")[0]
