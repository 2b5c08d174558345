"""Flags of open_clip, FastCLIP and NeuCLIP that are not a setting of ours. Imports no torch.

Published trainers have no `--method`: they select one by switches (`--fastclip --npn ...`). Each
method's row in the catalogue says which switches select it; this module reads them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from neuclip.catalogue.registry import DEFAULT_METHOD, METHODS, method_info
from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PublishedFlags:
    """Flags of open_clip, FastCLIP and NeuCLIP that are not a setting: most select a method.

    Attributes:
        fastclip: a method of the FastCLIP family
        npn: NeuCLIP's prototype network
        siglip: the pairwise sigmoid loss
        multiply_tau: the objective carries the factor tau
        temperature_scheme: what the temperature is
        nu_update: rule of the moving average
        local_loss: accepted without effect, the gradient over the global batch is always exact
        gather_with_grad: accepted without effect, as --local-loss
        dataset_type: same as --data-format
    """

    fastclip: Switch = False
    npn: Switch = False
    siglip: Switch = False
    multiply_tau: Switch = False
    temperature_scheme: Annotated[
        Literal["global_constant", "global_learnable", "individual_learnable", "individual"] | None,
        arg(
            help_behavior_hint="", metavar="{global_constant,global_learnable,individual_learnable}"
        ),
    ] = None
    nu_update: Annotated[
        Literal["sox", "scent"] | None, arg(help_behavior_hint="", metavar="{sox,scent}")
    ] = None
    local_loss: Switch = False
    gather_with_grad: Switch = False
    dataset_type: Annotated[
        Literal["webdataset", "csv", "auto"] | None,
        arg(help_behavior_hint="", metavar="{webdataset,csv,auto}"),
    ] = None

    def given(self) -> dict[str, object]:
        """The flags of a command line, in one spelling."""
        given = {
            key: value
            for key, value in asdict(self).items()
            if value is not None and value is not False
        }
        if given.get("temperature_scheme") == "individual":
            given["temperature_scheme"] = "individual_learnable"
        return given


# The switches that select a method, with the value that published trainers assume.
SWITCHES: Mapping[str, object] = {
    "fastclip": False,
    "npn": False,
    "siglip": False,
    "multiply_tau": False,
    "temperature_scheme": "global_learnable",
    "nu_update": "sox",
}

# Published flags that have the meaning of a setting, and those without a meaning here.
SAME_AS: Mapping[str, tuple[str, str]] = {
    "dataset_type": ("data", "data_format"),
}
WITHOUT_EFFECT: Mapping[str, str] = {
    "local_loss": "the gradient over the global batch is always exact",
    "gather_with_grad": "the gradient over the global batch is always exact",
}


@dataclass(frozen=True)
class MethodChoice:
    """The method that a command line selects.

    Attributes:
        method: its name; none: the line selects none, and the configuration decides.
        published: whether the line selects it by the switches of the FastCLIP family's trainers.
        notes: what the user should know of the choice.
    """

    method: str | None
    published: bool = False
    notes: tuple[str, ...] = ()


def choose_method(
    given: Mapping[str, object], method: str | None, below: str | None
) -> MethodChoice:
    """Reads the published switches of a command line.

    Args:
        given: the flags of `PublishedFlags` on it.
        method: the value of `--method`, if given.
        below: the method of the recipe or configuration file, if any.

    Raises:
        UserError: the switches select no method, or another one than `--method`.
    """
    if method is not None:
        method_info(method)
    switches = {key: value for key, value in given.items() if key in SWITCHES}
    if switches:
        return _selected(switches, method)
    if method is not None or below is not None:
        return MethodChoice(method)
    if given:
        note = f"method openclip: {_flags(given)} without --fastclip (--method chooses another)"
        return MethodChoice("openclip", notes=(note,))
    note = f"method {DEFAULT_METHOD}, the default (--method chooses another)"
    return MethodChoice(None, notes=(note,))


def spellings() -> dict[str, Mapping[str, object]]:
    """The published switches of every method that has them."""
    found = {name: info.spelling for name, info in METHODS.items()}
    return {name: spelling for name, spelling in found.items() if spelling is not None}


def _selected(switches: Mapping[str, object], method: str | None) -> MethodChoice:
    known = spellings()
    if method is not None:
        implied = known.get(method, {})
    elif switches.get("npn"):
        implied = {"fastclip": True, "multiply_tau": True}
    else:
        implied = {}
    wanted = {**SWITCHES, **implied, **switches}
    text = _flags(switches)
    name = next((name for name, flags in known.items() if {**SWITCHES, **flags} == wanted), None)
    if method is not None and name != method:
        raise UserError(f"{text} contradicts --method {method}: leave one of them out")
    if name is None and switches.get("npn"):
        raise UserError(
            f"{text} contradict each other; neuclip is selected by {_flags(known['neuclip'])}"
        )
    if name is None:
        lines = [f"{name}: {_flags(flags)}" for name, flags in known.items()]
        raise UserError("\n".join([f"{text} selects no method; these do", *lines]))
    notes = () if method else (f"method {name}, selected by {text}",)
    return MethodChoice(name, published=bool(wanted["fastclip"]), notes=notes)


def _flags(given: Mapping[str, object]) -> str:
    return " ".join(flag_text(key, value) for key, value in given.items()) or "(none of these)"


def flag_text(key: str, value: object) -> str:
    """A published flag as it is typed."""
    flag = "--" + key.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
