"""The entry `neuclip` of a checkpoint, and errors for entries that are not as neuclip writes them.

A file without checksums may hold anything. Missing and wrong entries are reported in one line with
their names, wherever they are used.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.errors import printable

_LARGEST = 2**63


class OwnEntry(dict[str, Any]):
    """What only neuclip writes: settings, step, state of the loss, ...

    A missing key raises a CheckpointError instead of a KeyError.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        raise _malformed(self._path, f"it has no entry neuclip/{key}")


def own_entry(content: Mapping[Any, Any], path: Path) -> OwnEntry | None:
    """The entry `neuclip`; None if neuclip did not write the checkpoint.

    Args:
        content: the checkpoint.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: a value is not of the kind that neuclip writes.
    """
    if "neuclip" not in content:
        return None
    found = content["neuclip"]
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise _malformed(path, f"its entry neuclip is {_shown(found)}")
    for key, (expected, fits) in _EXPECTED.items():
        if key in found and not fits(found[key]):
            raise _malformed(path, f"its entry neuclip/{key} is {_shown(found[key])}: {expected}")
    return OwnEntry(found, path)


@contextmanager
def restoring(path: Path) -> Generator[None]:
    """Reports state that does not fit in one line, for a `with` block that restores a checkpoint.

    Raises:
        CheckpointError: the block found a missing key, a value of another kind or another shape.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {printable(str(error), 200)}"
        raise _malformed(path, f"its state cannot be restored ({why})") from error


def _malformed(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is not as neuclip wrote it: {why}; take another checkpoint, or its "
        "weights alone (--pretrained)"
    )


def _shown(value: object) -> str:
    if isinstance(value, str | float | bool) or value is None:
        return printable(repr(value), 60)
    return f"of the type {type(value).__name__}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_optional_mapping(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_state(value: object) -> bool:
    return value is None or isinstance(value, Tensor)


def _is_damage(value: object) -> bool:
    counts = ("by_kind", "by_shard")
    return (
        isinstance(value, dict)
        and _is_count(value.get("total"))
        and isinstance(value.get("examples", []), list)
        and all(
            isinstance(found := value.get(key, {}), dict) and all(map(_is_count, found.values()))
            for key in counts
        )
    )


_COUNT = ("a whole number from 0 is expected", _is_count)
_POSITIVE = ("a whole number from 1 is expected", _is_positive)
_MAPPING = ("a mapping is expected", _is_mapping)
_STATE = ("a tensor is expected", _is_state)
_EXPECTED: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "config": ("YAML is expected", _is_text),
    "architecture": _MAPPING,
    "loss": _MAPPING,
    "loss_scale": _MAPPING,
    "token_head": _MAPPING,
    "low_rank": ("a mapping, or nothing, is expected", _is_optional_mapping),
    "step": _COUNT,
    "skipped": _COUNT,
    "fingerprint": ("a whole number is expected", _is_whole),
    "num_samples": _COUNT,
    "global_batch_size": _POSITIVE,
    "steps_per_epoch": _POSITIVE,
    "damage": ("counts of corrupt samples are expected", _is_damage),
    **dict.fromkeys(("rng", "rngs", "cuda_rng", "cuda_rngs"), _STATE),
}
