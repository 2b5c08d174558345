"""Prepares open_clip's towers for training: locks, activation checkpointing, compilation."""

import logging
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError

log = logging.getLogger("neuclip")

_CONTAINERS = {"resblocks", "blocks", "layers", "layer", "block", "stages"}
"""Names of the list of a tower's blocks in open_clip, timm and transformers."""
_STAGES = {"layer1", "layer2", "layer3", "layer4"}
"""The blocks of a ResNet."""


def blocks(towers: nn.Module) -> list[nn.Module]:
    """Finds the blocks that do nearly all of the towers' work, none inside another.

    These are transformer blocks, the stages of ResNets and ConvNeXts, and the table of token
    embeddings. An image or text tower without any of them is one block.
    """
    found: dict[str, nn.Module] = {}
    for name, module in towers.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        parent, _, last = name.rpartition(".")
        listed = parent.rpartition(".")[2] in _CONTAINERS and last.isdigit()
        if (listed or last in _STAGES or isinstance(module, nn.Embedding)) and any(
            True for _ in module.parameters()
        ):
            found[name] = module
    for tower in ("visual", "text"):
        module = getattr(towers, tower, None)
        if module is not None and not any(name.startswith(f"{tower}.") for name in found):
            found[tower] = module
    return list(found.values())


def prepare(
    towers: nn.Module, settings: ModelConfig, begins_trained: tuple[bool, bool] = (False, False)
) -> None:
    """Locks, checkpoints and compiles the towers according to the settings.

    Args:
        towers: the model.
        settings: of the towers.
        begins_trained: whether the image and the text tower start from weights in a file.

    Raises:
        UserError: the model does not support such a lock, or no weights are left to train.
    """
    if settings.lock_image:
        lock_image(towers, settings.lock_image_unlocked_groups, settings.lock_image_freeze_bn_stats)
    if settings.lock_text:
        lock_text(towers, settings.lock_text_unlocked_layers, settings.lock_text_freeze_layer_norm)
    for tower, locked, trained in zip(
        ("image", "text"),
        (settings.lock_image, settings.lock_text),
        begins_trained,
        strict=True,
    ):
        if locked and not trained:
            log.warning(
                "--lock-%s without --pretrained: that tower keeps its random weights", tower
            )
    learning = (p for n, p in towers.named_parameters() if not n.startswith("logit_"))
    if not any(p.requires_grad for p in learning):
        raise UserError(
            "--lock-image and --lock-text leave no weights to train; unlock one tower, or some "
            "groups of it with --lock-image-unlocked-groups or --lock-text-unlocked-layers"
        )
    if settings.grad_checkpointing:
        checkpoint_activations(towers)
    if settings.torchcompile:
        compile_blocks(towers, settings.torchcompile_backend)


def lock_image(towers: nn.Module, unlocked_groups: int, freeze_statistics: bool) -> None:
    """Freezes the image tower (LiT, https://arxiv.org/abs/2111.07991).

    Args:
        towers: the model.
        unlocked_groups: number of last groups, in open_clip's count, that are still trained.
        freeze_statistics: freeze the running statistics of frozen BatchNorms too.

    Raises:
        UserError: the model does not have that many groups to unlock.
    """
    lock = cast(Callable[..., None], towers.lock_image_tower)
    try:
        lock(unlocked_groups=unlocked_groups)
    except (AssertionError, RuntimeError, KeyError) as error:
        raise UserError(
            f"--lock-image-unlocked-groups {unlocked_groups}: this image tower "
            f"({type(towers.visual).__name__}) cannot be locked in part ({error}); remove the flag "
            "or choose another number"
        ) from None
    if not freeze_statistics:
        return
    for module in cast(nn.Module, towers.visual).modules():
        normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
        if normalizes and not any(p.requires_grad for p in module.parameters()):
            keep_evaluating(module)


def keep_evaluating(module: nn.Module) -> None:
    """Keeps a module in evaluation mode when `train()` is called on the model.

    open_clip replaces the module by one without `num_batches_tracked`, which changes the layout of
    checkpoints.
    """
    module.eval()
    cast(Any, module).train = lambda mode=True: module


def lock_text(towers: nn.Module, unlocked_layers: int, freeze_layer_norm: bool) -> None:
    """Freezes the text tower.

    Args:
        towers: the model.
        unlocked_layers: number of last groups, in open_clip's count, that are still trained.
        freeze_layer_norm: freeze LayerNorms too.
    """
    lock = cast(Callable[..., None], towers.lock_text_tower)
    try:
        lock(unlocked_layers=unlocked_layers, freeze_layer_norm=freeze_layer_norm)
    except AssertionError:  # open_clip's own text towers always freeze their LayerNorms
        lock(unlocked_layers=unlocked_layers, freeze_layer_norm=True)
        for name, module in towers.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.startswith("visual."):
                module.requires_grad_(True)


def checkpoint_activations(towers: nn.Module) -> None:
    """Recomputes activations in the backward pass, in towers that support it.

    Only the inputs of the blocks are kept.
    """
    cast(Callable[[bool], None], towers.set_grad_checkpointing)(True)
    visual = cast(nn.Module, towers.visual)
    if not any(getattr(module, "grad_checkpointing", False) for module in visual.modules()):
        log.warning(
            "--grad-checkpointing: the image tower (%s) does not support it, only the text tower "
            "is checkpointed", type(visual).__name__,
        )  # fmt: skip


def compile_blocks(towers: nn.Module, backend: str) -> None:
    """Compiles each block. Equal blocks share their code; the names of weights do not change."""
    for block in blocks(towers):
        if not isinstance(block, nn.Embedding):
            block.compile(backend=backend)
