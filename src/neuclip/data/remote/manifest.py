"""`manifest.json` beside shards: their names, sizes, checksums and numbers of samples.

    {"version": 1, "shards": [{"name": "00000.tar", "size": 1, "sha256": "...", "samples": 1}]}

`neuclip data pack` writes one. With it remote shards need not be fetched to be counted, and what is
fetched is checked.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

MANIFEST = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: of its file, without a folder.
        size: in bytes.
        sha256: of its bytes, in hexadecimal.
        samples: how many it holds.
    """

    name: str
    size: int
    sha256: str
    samples: int


def manifest_text(shards: Iterable[ShardEntry]) -> str:
    """The content of a manifest, a line per shard."""
    lines = ",\n".join("  " + json.dumps(asdict(shard)) for shard in shards)
    return f'{{"version": {_VERSION}, "shards": [\n{lines}\n]}}\n'


def parse_manifest(text: str | bytes) -> dict[str, ShardEntry]:
    """The shards of a manifest by name.

    Raises:
        ValueError: it is no manifest of this version; the message says what is wrong.
    """
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, not {_VERSION}")
        entries = [ShardEntry(**shard) for shard in content["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a manifest: {error!r}") from None
    for entry in entries:
        types = (type(entry.name), type(entry.size), type(entry.sha256), type(entry.samples))
        if types != (str, int, str, int) or entry.size < 0 or entry.samples < 0:
            raise ValueError(f"a shard that is none: {entry}")
    return {entry.name: entry for entry in entries}
