"""Packages as `npm pack NAME` writes them: `NAME-VERSION.tgz` in a folder."""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip.errors import UserError
from neuclip.untrusted import parse_json

MAX_MEMBER = 2**28
"""Largest member that is read, in bytes; the largest icon set has 104 MB."""


@dataclass(frozen=True)
class NpmPackage:
    """A packed npm package.

    Attributes:
        name: as npm says it, for example "@iconify/json".
        version: such as "2.2.535".
        path: the tarball.
    """

    name: str
    version: str
    path: Path

    @classmethod
    def newest(cls, folder: Path, name: str) -> "NpmPackage | None":
        """The newest version of a package in a folder; None if there is none."""
        stem = name.removeprefix("@").replace("/", "-")
        versions: list[tuple[list[int], str, Path]] = []
        for path in folder.glob(f"{stem}-*.tgz"):
            found = re.fullmatch(rf"{re.escape(stem)}-((\d+)\.(\d+)\.(\d+).*)\.tgz", path.name)
            if found:
                versions.append(([int(part) for part in found.groups()[1:]], found[1], path))
        if not versions:
            return None
        _, version, path = max(versions)
        return cls(name, version, path)

    @classmethod
    def find(cls, folder: Path, name: str) -> "NpmPackage":
        """The newest version of a package in a folder.

        Raises:
            UserError: there is none; the message says how to get it.
        """
        found = cls.newest(folder, name)
        if found is None:
            stem = name.removeprefix("@").replace("/", "-")
            raise UserError(
                f"{folder} has no {stem}-VERSION.tgz: run `npm pack {name}` in that folder"
            )
        return found

    def read(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Reads members in the order of the tarball.

        Args:
            wanted: called with a member's path below `package/`.

        Yields:
            Path and content.

        Raises:
            UserError: the tarball is damaged, or a member is too large.
        """
        try:
            with tarfile.open(self.path) as tar:
                for member in tar:
                    path = member.name.partition("/")[2]
                    if not (member.isfile() and wanted(path)):
                        continue
                    if member.size > MAX_MEMBER:
                        raise UserError(
                            f"{self.path}: {path} has {member.size:,} bytes, more than "
                            f"{MAX_MEMBER:,}: this is not a package of icons"
                        )
                    content = tar.extractfile(member)
                    assert content is not None
                    yield path, content.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path} cannot be read ({error}): run `npm pack {self.name}` again"
            ) from error

    def json(self, path: str) -> Any:  # noqa: ANN401
        """One JSON member.

        Raises:
            UserError: there is no such member, or it is not JSON.
        """
        for _, content in self.read(lambda name: name == path):
            return self.parsed(path, content)
        raise UserError(
            f"{self.path} has no {path}: {self.name} {self.version} has another layout than the "
            "versions known here"
        )

    def parsed(self, path: str, content: bytes) -> Any:  # noqa: ANN401
        """The value of a JSON member.

        Raises:
            UserError: it is not JSON.
        """
        try:
            return parse_json(content, MAX_MEMBER)
        except ValueError as error:
            raise UserError(f"{self.path}: {path} is not JSON: {error}") from error
