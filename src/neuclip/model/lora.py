"""Low-rank updates of the towers' matrices (LoRA, Hu et al., https://arxiv.org/abs/2106.09685).

    W = W_0 + (alpha / rank) up @ down        down: [rank, in], up: [out, rank], 0 at the start

W_0 is frozen, so the first embedding is that of W_0 bit by bit. A fused matrix of queries, keys and
values has an update of its own for each of them. An update is a parametrization of the weight
(`torch.nn.utils.parametrize`): whoever reads the weight gets W, also the fused attention of torch,
which never calls its projections as modules.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuclip.config.adaptation_section import LORA_TARGETS, AdaptationConfig
from neuclip.errors import UserError
from neuclip.model.prepare import keep_evaluating

_KINDS = (
    (r"(^|\.)(in_proj_weight|in_proj\.weight|qkv\.weight)$", ("q", "k", "v")),
    (r"\.kv\.weight$", ("k", "v")),
    (r"\.(q|query|q_proj|q_lin)[._]weight$", ("q",)),
    (r"\.(k|key|k_proj|k_lin)[._]weight$", ("k",)),
    (r"\.(v|value|v_proj|v_lin)[._]weight$", ("v",)),
    (r"att[^.]*\.(output\.)?(out_proj|out_lin|proj|c_proj|dense|o)\.weight$", ("out",)),
    (r"\.(mlp|ffn|intermediate|output|DenseReluDense)\.(?!\w*norm)\w+\.weight$", ("mlp",)),
)
"""What the names of matrices mean in open_clip, timm and transformers, the first that fits."""
_UPDATE = re.compile(r"(.+)\.parametrizations\.(\w+)\.0\.(down|up)\.(\d+)")
"""The names of an update's matrices in a state dict: module, weight, matrix, and block of rows."""


class LowRankUpdate(nn.Module):
    """W_0 to W, for `register_parametrization`.

    Args:
        weight: W_0, [rows, in].
        rank: of the update.
        scale: alpha / rank.
        count: number of equal blocks of rows that the matrix fuses.
        blocks: those that have an update.
        generator: on the CPU; draws `down` as loralib and PEFT do, uniform in +-1 / sqrt(in).
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        count: int,
        blocks: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        rows, width = weight.shape
        # At least float32: an update's steps are smaller than bfloat16 resolves.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._scale, self._count, self._blocks = scale, count, blocks
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for block in blocks:
            bound = 1 / math.sqrt(width)
            drawn = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
            self.down[str(block)] = nn.Parameter(drawn.to(weight.device, dtype))
            zeros = torch.zeros(rows // count, rank, dtype=dtype, device=weight.device)
            self.up[str(block)] = nn.Parameter(zeros)

    def forward(self, weight: Tensor) -> Tensor:
        """W of W_0."""
        parts = list(weight.chunk(self._count))
        with torch.autocast(weight.device.type, enabled=False):
            for block in self._blocks:
                update = self.up[str(block)] @ self.down[str(block)]
                parts[block] = parts[block] + (self._scale * update).to(weight.dtype)
        return torch.cat(parts) if self._count > 1 else parts[0]


@dataclass(frozen=True)
class Target:
    """A matrix that gets an update.

    Attributes:
        name: of the weight.
        kinds: what its blocks of rows are.
        blocks: those that get an update.
        shape: rows of a block, and columns.
    """

    name: str
    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Trained:
    """What a run trains of the towers.

    Attributes:
        matrices: for each tower, how many matrices of a name have an update.
        parameters: number of trained parameters.
        total: of all parameters, without the updates.
    """

    matrices: Mapping[str, Mapping[str, int]]
    parameters: int
    total: int

    @property
    def text(self) -> str:
        """Numbers and matrices in one line, for the log."""
        share = self.parameters / max(self.total, 1)
        size = f"{self.parameters:,} of {self.total:,} parameters ({share:.2%})"
        towers = [
            f"{tower} tower {', '.join(f'{n} x {name}' for name, n in found.items())}"
            for tower, found in self.matrices.items()
            if found
        ]
        return "; ".join([size, *towers])


def add_updates(towers: nn.Module, settings: AdaptationConfig, seed: int) -> None:
    """Freezes the towers, and gives their matrices low-rank updates.

    The temperature, a bias of the logits and `lora_modules_to_save` are trained too. BatchNorms
    keep their running statistics, which belong to the frozen weights.

    Args:
        towers: the model, with its starting weights.
        settings: rank, alpha, targets and towers.
        seed: of the random matrices, which are equal on all ranks.

    Raises:
        UserError: a tower has no such matrix, a matrix has fewer rows or columns than the rank, or
            a name in `lora_modules_to_save` matches no weight.
    """
    rank = settings.lora_rank
    assert rank is not None
    targets = find_targets(towers, settings)
    _check(towers, settings, targets)
    _freeze(towers, settings)
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        owner, _, attribute = target.name.rpartition(".")
        module = towers.get_submodule(owner)
        update = LowRankUpdate(
            getattr(module, attribute),
            rank,
            settings.lora_alpha / rank,
            len(target.kinds),
            target.blocks,
            generator,
        )
        # unsafe: shape and type are right by construction, and towers may be without memory.
        parametrize.register_parametrization(module, attribute, update, unsafe=True)


def find_targets(towers: nn.Module, settings: AdaptationConfig) -> list[Target]:
    """The matrices of the towers that get an update, in the order of the towers.

    As in PEFT, a matrix that is trained in full (`lora_modules_to_save`) gets none.
    """
    wanted, kept = settings.lora_targets.split(","), _kept_parts(settings)
    found: list[Target] = []
    for name, parameter in towers.named_parameters():
        if settings.lora_towers not in ("both", tower_of(name)) or parameter.ndim != 2:
            continue
        if any(part in name for part in kept):
            continue
        kinds = kinds_of(name)
        blocks = tuple(number for number, kind in enumerate(kinds) if kind in wanted)
        if blocks and len(parameter) % len(kinds) == 0:
            shape = (len(parameter) // len(kinds), parameter.shape[1])
            found.append(Target(name, kinds, blocks, shape))
    return found


def kinds_of(name: str) -> tuple[str, ...]:
    """What the equal blocks of rows of a matrix are, by its name; empty if it gets no update."""
    return next((kinds for pattern, kinds in _KINDS if re.search(pattern, name, re.I)), ())


def tower_of(name: str) -> str:
    """The tower of a weight."""
    return "image" if name.startswith("visual.") else "text"


def _check(towers: nn.Module, settings: AdaptationConfig, targets: list[Target]) -> None:
    rank = settings.lora_rank
    for tower in ("image", "text"):
        if settings.lora_towers not in ("both", tower):
            continue
        if not any(tower_of(target.name) == tower for target in targets):
            module = towers.visual if tower == "image" else getattr(towers, "text", towers)
            other = "text" if tower == "image" else "image"
            remedy = "another tower" if settings.lora_towers == tower else f"--lora-towers {other}"
            kept = settings.lora_modules_to_save
            besides = f" besides those of --lora-modules-to-save {kept}" if kept else ""
            raise UserError(
                f"--lora-rank {rank}: the {tower} tower ({_kind(module)}) has no matrices of "
                f"--lora-targets {settings.lora_targets}{besides} (convolutions get no update); "
                f"give {remedy}, or other targets of {', '.join(LORA_TARGETS)}"
            )
    smallest = min(targets, key=lambda target: min(target.shape))
    if rank is not None and rank > min(smallest.shape):
        rows, columns = smallest.shape
        raise UserError(
            f"--lora-rank {rank} is above the rank of {smallest.name} ({rows} x {columns}): at "
            f"most {min(smallest.shape)}, usually 4 to 64"
        )


def _kind(module: object) -> str:
    """The class of a tower, of timm's inside its wrapper."""
    return type(getattr(module, "trunk", module)).__name__


def _kept_parts(settings: AdaptationConfig) -> list[str]:
    """Parts of the names of the weights that are trained in full."""
    parts = (part.strip() for part in (settings.lora_modules_to_save or "").split(","))
    return [part for part in parts if part]


def _freeze(towers: nn.Module, settings: AdaptationConfig) -> None:
    kept = _kept_parts(settings)
    matched: set[str] = set()
    for name, parameter in towers.named_parameters():
        parts = [part for part in kept if part in name]
        matched.update(parts)
        if parameter.ndim and not parts:
            parameter.requires_grad_(False)
    if missing := [part for part in kept if part not in matched]:
        raise UserError(f"--lora-modules-to-save {missing[0]}: no weight has this in its name")
    for module in towers.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            keep_evaluating(module)


def has_updates(towers: nn.Module) -> bool:
    """Whether the towers have low-rank updates."""
    return any(isinstance(module, LowRankUpdate) for module in towers.modules())


def count_trained(towers: nn.Module) -> Trained:
    """What is trained of the towers."""
    matrices: dict[str, Counter[str]] = {"image": Counter(), "text": Counter()}
    updates = trained = total = 0
    for name, parameter in towers.named_parameters():
        size = parameter.numel()
        trained += size if parameter.requires_grad else 0
        total += size
        if _UPDATE.fullmatch(name) is not None:
            updates += size
        elif name.endswith(".original"):
            owner = name.removesuffix(".original").replace("parametrizations.", "")
            short = re.split(r"\.\d+\.", owner.removesuffix(".weight"))[-1]
            matrices[tower_of(name)][short] += 1
    return Trained(matrices, trained, total - updates)


def stored_weights(towers: nn.Module) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, by name, sharing memory with the towers.

    Of towers with updates: what is trained, and the scalars; the starting weights are in a file.
    """
    weights = towers.state_dict()
    if not has_updates(towers):
        return weights
    kept = {name for name, p in towers.named_parameters() if p.requires_grad or p.ndim == 0}
    return {name: value for name, value in weights.items() if name in kept}


def merge(
    full: Mapping[str, Tensor], stored: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The weights of plain towers.

    Args:
        full: the starting weights, by the names of the towers.
        stored: as of `stored_weights`.
        scale: alpha / rank.

    Raises:
        KeyError: `stored` belongs to another architecture.
        ValueError: its matrices have other shapes.
    """
    merged = dict(full)
    for name, value in stored.items():
        if _UPDATE.fullmatch(name) is None:
            merged[name] = value
    for target, block, up, down in _updates(stored):
        if merged[target] is full[target]:
            # At least float32, as in training: an update may be below what float16 resolves.
            dtype = torch.promote_types(full[target].dtype, torch.float32)
            merged[target] = full[target].to(dtype, copy=True)
        rows = merged[target][block * len(up) : (block + 1) * len(up)]
        if up.shape[1:] != down.shape[:1] or rows.shape != (len(up), down.shape[-1]):
            raise ValueError(f"an update of {target} has another shape")
        rows += (scale * (up @ down)).to(rows.dtype)
    return merged


def _updates(stored: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Of each update: its weight, the block of rows, and the matrices."""
    for name, up in stored.items():
        match = _UPDATE.fullmatch(name)
        if match is not None and match[3] == "up":
            down = stored[f"{match[1]}.parametrizations.{match[2]}.0.down.{match[4]}"]
            yield f"{match[1]}.{match[2]}", int(match[4]), up, down
