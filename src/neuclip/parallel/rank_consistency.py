"""Checks that all ranks run the same program on the same data.

A rank with another setting, version or data set would not fail: it would train something else
along with the others, or wait forever.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import neuclip
from neuclip import __version__
from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.launch import hostname

_MAY_DIFFER = {"data.cache_dir", "data.cache_size_gb", "data.workers"}
"""Settings that may differ between machines."""

_SHOWN = 5
"""Differences listed in an error."""


def check_same_program(tree: dict[str, Any]) -> None:
    """Checks that all ranks have the same settings, source code and torch.

    Args:
        tree: the settings, as nested plain values.

    Raises:
        UserError: on all ranks; names the differences.
    """
    settings = {f"setting {name}": value for name, value in _leaves(tree)}
    for name in _MAY_DIFFER:
        settings.pop(f"setting {name}", None)
    versions = {
        "torch": torch.__version__,
        "neuclip": __version__,
        "neuclip's source": source_digest(),
    }
    check_same({**versions, **settings})


def check_same_data(samples: int, order: str, files: str) -> None:
    """Checks that all ranks have found the same samples, in files of the same content.

    Args:
        samples: number of samples.
        order: the loader's digest of the samples' places and of their shuffling.
        files: digest of the files' names, sizes and first bytes.

    Raises:
        UserError: on all ranks; names the differences.
    """
    check_same(
        {
            "number of samples": str(samples),
            "digest of the data's index": order,
            "digest of the data's files": files,
        }
    )


def check_same(mine: Mapping[str, str]) -> None:
    """Checks that the values are equal on all ranks.

    Args:
        mine: this rank's values by name.

    Raises:
        UserError: on all ranks; names each difference, with ranks and machines.
    """
    everyone = collectives.gather_objects((hostname(), dict(mine)))
    found: list[str] = []
    for name in dict.fromkeys(name for _, values in everyone for name in values):
        holders: dict[str, list[int]] = {}
        for rank, (_, values) in enumerate(everyone):
            holders.setdefault(values.get(name, "missing"), []).append(rank)
        if len(holders) > 1:
            shown = [
                f"{value} on process {_list(ranks)} ({everyone[ranks[0]][0]})"
                for value, ranks in holders.items()
            ]
            found.append(f"{name}: {'; '.join(shown)}")
    if found:
        more = f"\nand {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            "the processes differ; start all with the same command, environment and files:\n"
            + "\n".join(found[:_SHOWN])
            + more
        )


def source_digest(package: Path = Path(neuclip.__file__).parent) -> str:
    """A short digest of the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in {".py", ".yaml", ".json"}:
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _leaves(tree: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{above}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, str(value))]
    return found


def _list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"
