"""The files below a folder, through links, in a reproducible order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neuclip.data.samples import Tally, UnusedKind

_OWN = ".neuclip"  # our indexes


@dataclass
class FileTree:
    """Lists the files below a folder; hidden files and links that are not followed are counted.

    A link to a folder elsewhere is followed once, however many links lead there. A link to a folder
    inside or around this one is not followed: its files are listed anyway, or there is no end.

    Attributes:
        folder: the folder.
        tally: all files and links, and those that are left out.
    """

    folder: Path
    tally: Tally = field(default_factory=lambda: Tally("files"))
    _visited: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    _top: str = ""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Each folder's path below the top, with a slash at its end, and its files, sorted."""
        self._top = os.path.realpath(self.folder)
        return self._walk("")

    def _walk(self, below: str) -> Iterator[tuple[str, list[str]]]:
        files: list[str] = []
        folders: list[str] = []
        try:
            status = (self.folder / below).stat()
            if (status.st_dev, status.st_ino) in self._visited:
                self._leave_out("link_repeated", below)
                return
            self._visited.add((status.st_dev, status.st_ino))
            with os.scandir(self.folder / below) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name == "__MACOSX":
                        if name != _OWN:
                            self._leave_out("hidden", below + name)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(name)
                    elif entry.is_dir(follow_symlinks=False) or self._follows(entry, below, files):
                        folders.append(name)
        except OSError:
            self._leave_out("unreadable", below)
        self.tally.total += len(files)
        if files:
            yield below, sorted(files)
        for name in sorted(folders):
            yield from self._walk(f"{below}{name}/")

    def _follows(self, entry: os.DirEntry[str], below: str, files: list[str]) -> bool:
        """Whether an entry is a link to a folder to follow; adds a link to a file to `files`."""
        path = below + entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_folder and self._leads_elsewhere(path):
            return True
        if is_folder:
            self._leave_out("link_repeated", path)
        elif is_file:
            files.append(entry.name)
        else:
            self._leave_out("link_broken" if entry.is_symlink() else "special", path)
        return False

    def _leads_elsewhere(self, link: str) -> bool:
        """Whether the target of a link is neither listed as a part of this folder nor around it."""
        target = os.path.realpath(self.folder / link)
        if f"{self._top}/".startswith(f"{target.rstrip('/')}/"):
            return False
        inside = target.removeprefix(f"{self._top}/")
        return inside == target or any(part.startswith(".") for part in inside.split("/"))

    def _leave_out(self, kind: UnusedKind, path: str) -> None:
        self.tally.total += 1
        self.tally.add(kind, path)
