"""What is done to open_clip's towers before they train: cut into blocks, locked, compiled."""

import logging
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError

log = logging.getLogger("neuclip")

_CONTAINERS = {"resblocks", "blocks", "layers", "layer", "block", "stages"}
"""How open_clip, timm and transformers call the list of a tower's blocks."""
_STAGES = {"layer1", "layer2", "layer3", "layer4"}
"""The blocks of a ResNet."""


def blocks(towers: nn.Module) -> list[nn.Module]:
    """The repeated parts that hold nearly all of the towers' work, none within another.

    Transformer blocks, the stages of ResNets and ConvNeXts, and the table of token embeddings; an
    image or text tower with none of these is one block.
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


def prepare(towers: nn.Module, settings: ModelConfig) -> None:
    """Locks, checkpoints and compiles the towers as the settings say.

    Raises:
        UserError: this model cannot be locked like that, or nothing would be left to learn.
    """
    if settings.lock_image:
        lock_image(towers, settings.lock_image_unlocked_groups, settings.lock_image_freeze_bn_stats)
    if settings.lock_text:
        lock_text(towers, settings.lock_text_unlocked_layers, settings.lock_text_freeze_layer_norm)
    for tower, locked, trained in zip(
        ("image", "text"),
        (settings.lock_image, settings.lock_text),
        settings.begins_trained,
        strict=True,
    ):
        if locked and not trained:
            log.warning(
                "--lock-%s without --pretrained: that tower stays as random as it is", tower
            )
    learning = (p for n, p in towers.named_parameters() if not n.startswith("logit_"))
    if not any(p.requires_grad for p in learning):
        raise UserError(
            "--lock-image and --lock-text leave nothing of the towers to learn; unlock one, or some"
            " groups of it with --lock-image-unlocked-groups or --lock-text-unlocked-layers"
        )
    if settings.grad_checkpointing:
        checkpoint_activations(towers)
    if settings.torchcompile:
        compile_blocks(towers, settings.torchcompile_backend)


def lock_image(towers: nn.Module, unlocked_groups: int, freeze_statistics: bool) -> None:
    """Stops the image tower from learning (LiT, https://arxiv.org/abs/2111.07991).

    Args:
        towers: the model.
        unlocked_groups: the last groups, as open_clip counts them, learn nevertheless.
        freeze_statistics: BatchNorms that do not learn keep their running statistics too.

    Raises:
        UserError: the model cannot leave so many groups unlocked.
    """
    lock = cast(Callable[..., None], towers.lock_image_tower)
    try:
        lock(unlocked_groups=unlocked_groups)
    except (AssertionError, RuntimeError, KeyError) as error:
        raise UserError(
            f"--lock-image-unlocked-groups {unlocked_groups}: this image tower "
            f"({type(towers.visual).__name__}) cannot be locked in part ({error}); leave it out, "
            "or choose another number"
        ) from None
    if not freeze_statistics:
        return
    for module in cast(nn.Module, towers.visual).modules():
        normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
        if normalizes and not any(p.requires_grad for p in module.parameters()):
            _keep_evaluating(module)


def _keep_evaluating(module: nn.Module) -> None:
    """Leaves a module in evaluation mode whatever `train()` says to the model around it.

    open_clip puts a module without `num_batches_tracked` in its place, and so changes the
    checkpoint's layout.
    """
    module.eval()
    cast(Any, module).train = lambda mode=True: module


def lock_text(towers: nn.Module, unlocked_layers: int, freeze_layer_norm: bool) -> None:
    """Stops the text tower from learning.

    Args:
        towers: the model.
        unlocked_layers: the last groups, as open_clip counts them, learn nevertheless.
        freeze_layer_norm: LayerNorms do not learn either.
    """
    lock = cast(Callable[..., None], towers.lock_text_tower)
    try:
        lock(unlocked_layers=unlocked_layers, freeze_layer_norm=freeze_layer_norm)
    except AssertionError:  # open_clip's own text towers refuse to leave their LayerNorms out
        lock(unlocked_layers=unlocked_layers, freeze_layer_norm=True)
        for name, module in towers.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.startswith("visual."):
                module.requires_grad_(True)


def checkpoint_activations(towers: nn.Module) -> None:
    """Keeps only the inputs of the blocks for the backward pass, where the towers can."""
    cast(Callable[[bool], None], towers.set_grad_checkpointing)(True)
    visual = cast(nn.Module, towers.visual)
    if not any(getattr(module, "grad_checkpointing", False) for module in visual.modules()):
        log.warning(
            "--grad-checkpointing: the image tower (%s) has none, only the text tower is "
            "checkpointed", type(visual).__name__,
        )  # fmt: skip


def compile_blocks(towers: nn.Module, backend: str) -> None:
    """Compiles each block; equal blocks share their code, and names of weights stay as they are."""
    for block in blocks(towers):
        if not isinstance(block, nn.Embedding):
            block.compile(backend=backend)
