"""The layers of a tower from input to output, for learning rates that fall with depth.

The layers are those of open_clip's `lock`: the embeddings or the stem, the blocks in order (the
last one with the final normalization), and the projection. ResNets have their four stages in place
of blocks. For towers of timm the layers are those of timm's layer-wise decay.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from neuclip.errors import UserError

Layers = list[list[nn.Parameter]]
"""The parameters of each layer, the input's first."""


def image_layers(towers: nn.Module) -> Layers:
    """The layers of the image tower.

    Raises:
        UserError: the order of its layers is not known.
    """
    visual = cast(nn.Module, towers.visual)
    if hasattr(visual, "trunk"):
        return _timm_layers(visual)
    if hasattr(visual, "transformer"):
        stem = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
        return _complete(visual, [_parts(visual, stem), *_blocks(visual, "ln_post")])
    if hasattr(visual, "layer4"):
        stem = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
        stages = [_parts(visual, (f"layer{number}",)) for number in range(1, 5)]
        return _complete(visual, [_parts(visual, stem), *stages])
    raise _unknown("image", visual)


def text_layers(towers: nn.Module) -> Layers:
    """The layers of the text tower, which a plain CLIP has as its own attributes.

    Raises:
        UserError: the order of its layers is not known.
    """
    text = cast(nn.Module, getattr(towers, "text", towers))
    transformer = cast(nn.Module, getattr(text, "transformer", None))
    if hasattr(transformer, "resblocks"):
        embeddings = ("token_embedding", "positional_embedding", "cls_emb")
        layers = [_parts(text, embeddings), *_blocks(text, "ln_final")]
        if text is towers:
            return [*layers, _parts(text, ("text_projection",))]
        return _complete(text, layers)
    # Towers of transformers: an encoder with a list of layers, and a projection outside of it.
    encoder = getattr(transformer, "encoder", transformer)
    listed = next(
        (getattr(encoder, name) for name in ("layer", "layers", "block") if hasattr(encoder, name)),
        None,
    )
    if isinstance(listed, nn.ModuleList):
        embeddings = [p for name, p in transformer.named_parameters() if "embed" in name]
        return _complete(text, [embeddings, *(list(block.parameters()) for block in listed)])
    raise _unknown("text", text)


def _blocks(tower: nn.Module, last: str) -> Layers:
    """The transformer's blocks, the last one with the normalization after it."""
    blocks = cast(Iterable[nn.Module], cast(Any, tower).transformer.resblocks)
    layers = [list(block.parameters()) for block in blocks]
    layers[-1] += _parts(tower, (last,))
    return layers


def _timm_layers(visual: nn.Module) -> Layers:
    trunk = cast(nn.Module, visual.trunk)
    if not hasattr(trunk, "group_matcher"):
        raise _unknown("image", trunk)
    matcher: object = cast(Any, trunk).group_matcher(coarse=False)
    numbers = cast(Mapping[str, int], group_parameters(trunk, matcher, reverse=True))
    layers: Layers = [[] for _ in range(max(numbers.values()) + 1)]
    for name, parameter in trunk.named_parameters():
        layers[numbers[name]].append(parameter)
    return _complete(visual, [layer for layer in layers if layer])


def _parts(tower: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of some attributes of a tower; those that it does not have are left out."""
    found: list[nn.Parameter] = []
    for name in names:
        part = getattr(tower, name, None)
        if isinstance(part, nn.Parameter):
            found.append(part)
        elif isinstance(part, nn.Module):
            found += part.parameters()
    return found


def _complete(tower: nn.Module, layers: Layers) -> Layers:
    """The layers, and one more with the remaining parameters: the projection and its pooling."""
    known = {id(p) for layer in layers for p in layer}
    rest = [p for p in tower.parameters() if id(p) not in known]
    return [*layers, rest] if rest else layers


def _unknown(tower: str, module: nn.Module) -> UserError:
    return UserError(
        f"--{tower}-layer-decay: the order of the layers of this {tower} tower "
        f"({type(module).__name__}) is not known; remove the flag"
    )
