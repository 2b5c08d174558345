"""Groups of parameters that share weight decay and learning rate."""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor, nn

from neuclip.config.optimizer_section import OptimConfig
from neuclip.errors import UserError
from neuclip.model.tower_layers import Layers, image_layers, text_layers


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike.

    Attributes:
        parameters: of the towers, in their order.
        weight_decay: zero for gains, biases and the temperature.
        rate_scale: factor on the towers' learning rate, by layer-wise decay.
        fallback: embeddings, which optimisers of matrices such as Muon leave to AdamW.
        is_temperature: `logit_scale`, which may have a learning rate of its own.
    """

    parameters: list[nn.Parameter]
    weight_decay: float
    rate_scale: float = 1.0
    fallback: bool = False
    is_temperature: bool = False


def is_gain_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether a parameter gets no weight decay, by open_clip's rule."""
    marks = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(mark in name for mark in marks)


def parameter_groups(
    towers: nn.Module,
    settings: OptimConfig,
    *,
    embeddings_apart: bool = False,
    head: nn.Module | None = None,
) -> list[ParameterGroup]:
    """The groups of all trainable parameters: gains and biases, weights, and the temperature.

    Args:
        towers: the model; parameters without gradients are left out.
        settings: hold the weight decay and the layer-wise decay; with the latter the first two
            kinds have one group for each layer, those nearest to the input first.
        embeddings_apart: give embeddings groups of their own.
        head: beside the towers, with the rate of their last layers; optimisers of matrices leave it
            to AdamW, as they do embeddings.

    Raises:
        UserError: layer-wise decay of a tower that is locked, or whose layers are not known.
    """
    scales = _rate_scales(towers, settings)
    embeddings = set(_embeddings(towers)) if embeddings_apart else set()
    temperature: list[nn.Parameter] = []
    by_kind: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    beside = {} if head is None else dict(head.named_parameters(prefix="head"))
    if embeddings_apart:
        embeddings |= set(beside.values())
    for name, parameter in (*towers.named_parameters(), *beside.items()):
        if not parameter.requires_grad:
            continue
        if name.endswith("logit_scale"):
            temperature.append(parameter)
            continue
        decayed = not is_gain_or_bias(name, parameter)
        kind = (decayed, scales.get(parameter, 1.0), parameter in embeddings)
        by_kind.setdefault(kind, []).append(parameter)
    groups = [
        ParameterGroup(by_kind[kind], settings.wd if kind[0] else 0.0, kind[1], kind[2])
        for kind in sorted(by_kind)
    ]
    if temperature:
        groups.append(ParameterGroup(temperature, 0.0, is_temperature=True))
    return groups


def _rate_scales(towers: nn.Module, settings: OptimConfig) -> dict[nn.Parameter, float]:
    """The factor of each parameter: decay ** (layers above it), as in BEiT and open_clip."""
    scales: dict[nn.Parameter, float] = {}
    for tower, decay, find in (
        ("image", settings.image_layer_decay, image_layers),
        ("text", settings.text_layer_decay, text_layers),
    ):
        if decay is None:
            continue
        layers: Layers = find(towers)
        if not any(p.requires_grad for layer in layers for p in layer):
            raise UserError(
                f"--{tower}-layer-decay has no effect: --lock-{tower} trains nothing of that "
                "tower; leave one of them out"
            )
        for depth, layer in enumerate(reversed(layers)):
            scales |= dict.fromkeys(layer, decay**depth)
    return scales


def _embeddings(towers: nn.Module) -> Generator[nn.Parameter]:
    """Tables of embeddings, and learned positions and class tokens."""
    for module in towers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or "embed" in name or name == "cls_token":
                yield parameter
