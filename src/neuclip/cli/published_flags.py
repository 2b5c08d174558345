"""How open_clip, FastCLIP and NeuCLIP spell a method on the command line. Imports no torch.

There a method is a conjunction of switches (`--fastclip --npn --multiply_tau ...`); here it is a
name. `SPELLINGS` is the dictionary between the two.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from neuclip.catalogue.registry import METHODS, method_info
from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Published:
    """Flags of open_clip, FastCLIP and NeuCLIP that are no setting here: most spell a method.

    Attributes:
        fastclip: a method of the FastCLIP family
        npn: NeuCLIP's prototype network
        siglip: the pairwise sigmoid loss
        multiply_tau: the objective carries the factor tau
        temperature_scheme: what the temperature is
        nu_update: rule of the moving average
        local_loss: accepted without effect, the gradient over the global batch is always exact
        gather_with_grad: accepted without effect, as --local-loss
        dataset_type: as --data-format
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
        """What stands on the command line, in one spelling."""
        given = {
            key: value
            for key, value in asdict(self).items()
            if value is not None and value is not False
        }
        if given.get("temperature_scheme") == "individual":
            given["temperature_scheme"] = "individual_learnable"
        return given


# The switches that spell a method, with what the published trainers assume of one left out.
UNSPELLED: Mapping[str, object] = {
    "fastclip": False,
    "npn": False,
    "siglip": False,
    "multiply_tau": False,
    "temperature_scheme": "global_learnable",
    "nu_update": "sox",
}

# What the published line of each method says; left out, `UNSPELLED` holds.
SPELLINGS: Mapping[str, Mapping[str, object]] = {
    "openclip": {},
    "siglip": {"siglip": True},
    "fastclip_v0": {"fastclip": True, "temperature_scheme": "global_learnable"},
    "fastclip_v1": {"fastclip": True, "temperature_scheme": "global_constant"},
    "fastclip_v2": {"fastclip": True, "temperature_scheme": "individual_learnable"},
    "fastclip_v3": {
        "fastclip": True,
        "multiply_tau": True,
        "temperature_scheme": "global_learnable",
    },
    "scent": {
        "fastclip": True,
        "multiply_tau": True,
        "temperature_scheme": "global_learnable",
        "nu_update": "scent",
    },
    "neuclip": {
        "fastclip": True,
        "npn": True,
        "multiply_tau": True,
        "temperature_scheme": "global_learnable",
    },
}

# What the published code of a method does and our default does not, unless the line says otherwise.
# Published hyper-parameters of the FastCLIP family were tuned with its temperature gradient.
PUBLISHED_FORM: Mapping[str, object] = {"temperature_gradient": "fastclip"}
PUBLISHED_NETWORK: Mapping[str, object] = {
    "num_prototypes": 4096,
    "refresh": "restart",
    "inner_steps": 10,
    "gradient": "detached",
    "gamma": None,  # by the rule
}

# Published flags that say what a setting of ours says, and those that say nothing here.
SAME_AS: Mapping[str, tuple[str, str]] = {
    "dataset_type": ("data", "data_format"),
}
WITHOUT_EFFECT: Mapping[str, str] = {
    "local_loss": "the gradient over the global batch is always exact",
    "gather_with_grad": "the gradient over the global batch is always exact",
}


@dataclass(frozen=True)
class Choice:
    """The method that a command line chooses.

    Attributes:
        method: Its name; none: the line says nothing, and the configuration decides.
        published: The line spells it as the published trainers of the FastCLIP family do.
        notes: What the user should know of the choice.
    """

    method: str | None
    published: bool = False
    notes: tuple[str, ...] = ()


def choose_method(given: Mapping[str, object], method: str | None, below: str | None) -> Choice:
    """Reads the published switches of a command line.

    Args:
        given: The flags of `Published` that stand on it.
        method: `--method`, if given.
        below: The method of the recipe or configuration file, if any.

    Raises:
        UserError: the switches spell no method, or another one than `--method`, or one that
            does not exist here.
    """
    if method is not None:
        method_info(method)
    switches = {key: value for key, value in given.items() if key in UNSPELLED}
    if switches:
        return _spelled(switches, method)
    if method is not None or below is not None:
        return Choice(method)
    if given:
        note = f"method openclip: {_flags(given)} without --fastclip (--method chooses another)"
        return Choice("openclip", notes=(note,))
    return Choice(None, notes=("method neuclip, the default (--method chooses another)",))


def _spelled(switches: Mapping[str, object], method: str | None) -> Choice:
    if method is not None:
        implied = SPELLINGS.get(method, {})
    elif switches.get("npn"):
        implied = {"fastclip": True, "multiply_tau": True}
    else:
        implied = {}
    wanted = {**UNSPELLED, **implied, **switches}
    text = _flags(switches)
    name = next((name for name, says in SPELLINGS.items() if {**UNSPELLED, **says} == wanted), None)
    if method is not None and name != method:
        raise UserError(f"{text} contradicts --method {method}: leave one of them out")
    if name is None and switches.get("npn"):
        raise UserError(
            f"{text} contradict each other; neuclip is spelled {_flags(SPELLINGS['neuclip'])}"
        )
    if name is None:
        known = [f"{name}: {_flags(SPELLINGS[name])}" for name in SPELLINGS if name in METHODS]
        raise UserError("\n".join([f"{text} selects no method; these do", *known]))
    if name not in METHODS:
        raise UserError(
            f"{text} is the method {name}, which this version does not have; "
            f"it has {', '.join(METHODS)}"
        )
    notes = () if method else (f"method {name}, spelled {text}",)
    return Choice(name, published=bool(wanted["fastclip"]), notes=notes)


def _flags(given: Mapping[str, object]) -> str:
    return " ".join(flag_text(key, value) for key, value in given.items()) or "(none of these)"


def flag_text(key: str, value: object) -> str:
    """A published flag as it is typed."""
    flag = "--" + key.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
