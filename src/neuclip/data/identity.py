"""The identity of a data set: equal for copies of the same data, wherever they are.

Reading all of a training set would take hours. Places spread evenly over it stand for the rest.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neuclip.data.remote.transport import PIPE
from neuclip.data.sources.source import Source

_PLACES = 64
_HEAD = 2**16  # bytes of each file


@dataclass(frozen=True)
class DataIdentity:
    """What a run reads.

    Attributes:
        samples: number of samples.
        digest: hexadecimal digest of layout, and at 64 places of the sample's key and of its file's
            name, size and first 64 KiB. Remote files count by name.
    """

    samples: int
    digest: str


def identify(source: Source) -> DataIdentity:
    """Reads the identity of a source."""
    digest = hashlib.sha256(source.layout.digest(0, None).encode())
    known: dict[str, bytes] = {}
    for position in _spread(len(source)):
        name = str(source.file_of(position))
        if name not in known:
            known[name] = _file_identity(name)
        key = "" if "://" in name or name.startswith(PIPE) else source.locate(position)[1]
        digest.update(known[name] + key.encode("utf-8", "surrogateescape") + b"\0")
    return DataIdentity(len(source), digest.hexdigest()[:16])


def _spread(samples: int) -> Iterator[int]:
    """At most `_PLACES` positions, the first and the last among them."""
    last, most = samples - 1, min(samples, _PLACES)
    return (place * last // max(1, most - 1) for place in range(most))


def _file_identity(name: str) -> bytes:
    base = Path(name.partition("?")[0]).name.encode("utf-8", "surrogateescape")
    path = Path(name)
    try:
        if not path.is_file():
            return base + b"\0"
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return base + f"\0{path.stat().st_size}\0".encode() + hashlib.sha256(head).digest()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return base + b"\0"
