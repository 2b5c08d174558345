"""Optimisers by name: those of timm's factory, what each takes, and which are refused and why."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm.optim
import torch

from neuclip.config.optimizer_section import OptimConfig
from neuclip.errors import UserError, nearest, printable

factory = cast(Any, timm.optim)

LOOKAHEAD = "lookahead_"
"""timm's prefix for an optimiser whose weights are averaged with slower ones."""

_REFUSED = {
    "adahessian": "it needs second derivatives, which the losses here do not have",
    "lbfgs": "it evaluates the loss several times in a step, and a contrastive loss has state",
}
_ELEMENTWISE = {
    "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD",
    "AdaBelief", "AdamWLegacy", "Adan", "Adopt", "LaProp", "Lion", "MADGRAD", "NAdamLegacy",
    "NAdamW", "RAdamLegacy", "RMSpropTF", "SGDW",
}  # fmt: skip
"""Classes that update every number of a parameter by itself, so that they can work on shards."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser by its name, with the settings that it was given.

    Attributes:
        name: in timm's factory, with `lookahead_` before it or not.
        arguments: of its constructor besides the parameters, the rate and the weight decay.
    """

    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, settings: OptimConfig) -> "OptimizerKind":
        """The optimiser that the settings name.

        Raises:
            UserError: unknown, refused, not installed, or a setting that it does not take.
        """
        name = settings.opt
        base = name.removeprefix(LOOKAHEAD)
        if base in _REFUSED:
            raise UserError(f"--opt {name}: out of scope: {_REFUSED[base]}")
        known = [each for each in factory.list_optimizers() if each not in _REFUSED]
        if base not in known:
            raise UserError(f"--opt {name}: no such optimiser; {nearest(base, cast(Any, known))}")
        _check_package(name, factory.get_optimizer_info(base).opt_class)
        if base.startswith("madgrad") and settings.warm_start_steps:
            raise UserError(
                f"--warm-start-steps with --opt {name}: it moves weights at a learning rate of 0; "
                "leave one of them out"
            )
        return cls(name, _arguments(settings, base))

    @property
    def leaves_embeddings(self) -> bool:
        """Whether it updates matrices as such, and leaves embeddings to AdamW."""
        return self._class_name == "Muon"

    @property
    def elementwise(self) -> bool:
        """Whether every number of a parameter is updated by itself."""
        averages = self.arguments.get("caution") or (self._info.defaults or {}).get("caution")
        return self._class_name in _ELEMENTWISE and not averages

    def check_shards(self) -> None:
        """Checks that the optimiser can update local shards.

        Raises:
            UserError: it needs full matrices, or norms of full parameters.
        """
        if not self.elementwise:
            raise UserError(
                f"--opt {self.name} with --fsdp: it reads whole parameters, of which each process "
                "holds a part; adamw, lion and sgd update every number by itself"
            )

    def create(
        self, groups: Sequence[Mapping[str, Any]], rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """Builds the optimiser.

        Args:
            groups: `params` and what differs between groups.
            rate: the peak learning rate, which some optimisers scale their decay by.
            device: of the parameters; Adam and AdamW are fused on CPUs and CUDA.

        Raises:
            UserError: an argument has a value that it refuses.
        """
        arguments = dict(self.arguments)
        if self.name in {"adam", "adamw"} and device.type in {"cpu", "cuda"}:
            arguments.setdefault("fused", True)
        if self._class_name == "Kron":
            # Its random numbers then follow from its own state, equal on all ranks.
            arguments.setdefault("deterministic", True)
        try:
            return factory.create_optimizer_v2(
                [dict(group) for group in groups], self.name, lr=rate, **arguments
            )
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise UserError(f"--opt {self.name}: {printable(str(error), 200)}") from None

    @property
    def _info(self) -> Any:  # noqa: ANN401  timm's OptimInfo
        return factory.get_optimizer_info(self.name.removeprefix(LOOKAHEAD))

    @property
    def _class_name(self) -> str:
        found = self._info.opt_class
        return found.rpartition(".")[2] if isinstance(found, str) else found.__name__


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser's kernels skip a step by themselves, so that the host need not wait.

    torch's fused Adam does. Its fused SGD does not: a skipped first step leaves its momentum
    without a value.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, torch.optim.Adam)


def _check_package(name: str, opt_class: object) -> None:
    """Checks that the package of an optimiser which timm does not bring is installed.

    Raises:
        UserError: the package is missing, or there is no GPU for it.
    """
    if not isinstance(opt_class, str):
        return
    package = opt_class.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        how = "pip install bitsandbytes" if package == "bitsandbytes" else "NVIDIA's Apex"
        raise UserError(f"--opt {name} is of the package {package}, which is not installed: {how}")
    if not torch.cuda.is_available():
        raise UserError(f"--opt {name}: the optimisers of {package} need a GPU with CUDA")


def _arguments(settings: OptimConfig, base: str) -> dict[str, Any]:
    """The arguments of the constructor that were given.

    Raises:
        UserError: the optimiser does not take one of them.
    """
    info = factory.get_optimizer_info(base)
    given = dict(settings.opt_kwargs or {})
    for key, flag in (("lr", "--lr"), ("weight_decay", "--wd")):
        if key in given:
            raise UserError(f"--opt-kwargs {key}: use {flag}")
    taken = _parameters(base)
    if unknown := [key for key in given if key not in taken]:
        raise UserError(
            f"--opt-kwargs {unknown[0]}: {settings.opt} has no such argument; it has "
            f"{', '.join(sorted(taken))}"
        )
    named: dict[str, Any] = {
        "betas": _betas(settings, base),
        "eps": settings.eps,
        "momentum": settings.momentum,
    }
    has = {"betas": info.has_betas, "eps": info.has_eps, "momentum": info.has_momentum}
    for key, value in named.items():
        if value is None:
            continue
        if not has[key]:
            raise UserError(f"--{key} has no effect: --opt {settings.opt} has no {key}")
        if key in given:
            raise UserError(
                f"--opt-kwargs {key} and --{key.replace('betas', 'beta1')} set the same thing: "
                "leave one out"
            )
        given[key] = value
    return given


def _betas(settings: OptimConfig, base: str) -> tuple[float, ...] | None:
    """The decay rates, with the optimiser's own in place of those that were not given.

    Raises:
        UserError: it has no such rates.
    """
    rates = {0: settings.beta1, 1: settings.beta2}
    if all(rate is None for rate in rates.values()):
        return None
    info = factory.get_optimizer_info(base)
    read = 0 if not info.has_betas else 1 if base.endswith("adafactor") else info.num_betas
    for place, rate in rates.items():
        if rate is not None and place >= read:
            flag = f"--beta{place + 1}"
            raise UserError(f"{flag} has no effect: --opt {settings.opt} has no such rate")
    own: object = (info.defaults or {}).get("betas") or _parameters(base)["betas"].default
    betas = list(cast(tuple[float, ...], own)) if isinstance(own, tuple | list) else [0.9, 0.999]
    for place, rate in rates.items():
        betas[place] = betas[place] if rate is None else rate
    return tuple(betas)


def _parameters(base: str) -> dict[str, inspect.Parameter]:
    """The parameters of an optimiser's constructor besides those that have a flag of their own."""
    found = cast(Callable[..., object], factory.get_optimizer_class(base, bind_defaults=False))
    parameters = dict(inspect.signature(found).parameters)
    return {key: value for key, value in parameters.items() if key not in _COMMON}


_COMMON = {"params", "lr", "weight_decay", "self"}
