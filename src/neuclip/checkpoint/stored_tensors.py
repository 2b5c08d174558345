"""What a file stores of its tensors: a few bytes may claim tensors of any size."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from neuclip.checkpoint.common import CheckpointError


def check_stored(content: object, path: Path) -> None:
    """Checks that every number of every tensor is in the file.

    Strides of 0 repeat numbers, and meta tensors have none: copying such a tensor takes memory that
    the file's size does not show.

    Args:
        content: what `torch.load` made of the file.
        path: the file, for messages.

    Raises:
        CheckpointError: a tensor has more numbers than the file.
    """
    seen, left = set[int](), [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if not _is_stored(value):
                size = "x".join(str(side) for side in value.shape)
                raise CheckpointError(
                    f"checkpoint {path} holds a tensor of {size} numbers that are not all stored; "
                    "save it again with tensor.contiguous()"
                )
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # the same list may stand in many places, or in itself
            inner = value.values() if isinstance(value, Mapping) else value
            left += cast(Iterable[object], inner)


def _is_stored(value: Tensor) -> bool:
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def far_more(needed: int, held: int) -> bool:
    """Whether a model or a loss needs far more numbers than the file that describes it holds.

    Twice as many, and 2^25, are allowed: position embeddings are resized, and not all is saved.
    """
    return needed > 2 * held + 2**25


def stored_numbers(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold together; those that share a storage count once.

    Args:
        tensors: on the CPU.
    """
    found = dict[int, int]()
    for value in tensors:
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() // value.element_size()
    return sum(found.values())


def check_loss(loss: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Checks that a loss is not far larger than its state in a checkpoint.

    Args:
        loss: on the meta device, where it takes no memory.
        state: of the loss, in the checkpoint.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: the settings in the checkpoint are for another loss.
    """
    needed = sum(value.numel() for value in (*loss.parameters(), *loss.buffers()))
    held = stored_numbers(value for value in state.values() if isinstance(value, Tensor))
    if far_more(needed, held):
        raise CheckpointError(
            f"checkpoint {path}: by its settings the loss has {needed:,} numbers, and {held:,} are "
            "stored; take another checkpoint, or its weights alone (--pretrained)"
        )
