"""`manifest.json` beside shards: their names, sizes, checksums and numbers of samples.

    {"version": 1, "shards": [{"name": "00000.tar", "size": 1, "sha256": "...", "samples": 1}]}

`neuclip data pack` writes it. With a manifest, remote shards need not be downloaded to count their
samples, and every download is verified.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from neuclip.untrusted import parse_json

MANIFEST = "manifest.json"
_MAX_SIZE = 2**25  # bytes; about 200,000 shards
_LARGEST = 2**40  # bytes of a shard
_SMALLEST = 2 * 512  # bytes of a sample: the header and the content of one member
_VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: file name without a folder.
        size: size in bytes.
        sha256: checksum in hexadecimal.
        samples: number of samples.
    """

    name: str
    size: int
    sha256: str
    samples: int


def manifest_text(shards: Iterable[ShardEntry]) -> str:
    """The content of a manifest, one line per shard."""
    lines = ",\n".join("  " + json.dumps(asdict(shard)) for shard in shards)
    return f'{{"version": {_VERSION}, "shards": [\n{lines}\n]}}\n'


def parse_manifest(text: str | bytes) -> dict[str, ShardEntry]:
    """The shards of a manifest by name.

    Raises:
        ValueError: the text is not a manifest of this version; the message gives the reason.
    """
    try:
        content = parse_json(text, _MAX_SIZE)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, not {_VERSION}")
        entries = [ShardEntry(**shard) for shard in content["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a manifest: {error!r}") from None
    for entry in entries:
        types = (type(entry.name), type(entry.size), type(entry.sha256), type(entry.samples))
        if types != (str, int, str, int) or not (
            0 <= entry.samples * _SMALLEST <= entry.size < _LARGEST
        ):
            raise ValueError(f"invalid shard entry: {entry}")
    return {entry.name: entry for entry in entries}
