"""Flags by which published trainers select a method or spell a setting. Imports no torch.

Published trainers have no `--method`: they select one by switches (`--fastclip --npn ...`). Each
method's row in the catalogue says which switches select it; this module reads them. A flag about
the data or the processes never selects a method. `neuclip.cli.foreign_flags` holds the flags that
change nothing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from neuclip.catalogue.registry import DEFAULT_METHOD, METHODS, method_info
from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PublishedFlags:
    """Flags of published trainers that select a method, or spell a setting in another way.

    Attributes:
        fastclip: a method of the FastCLIP family
        npn: NeuCLIP's prototype network
        siglip: the pairwise sigmoid loss
        multiply_tau: the objective carries the factor tau
        temperature_scheme: what the temperature is
        nu_update: rule of the moving average
        scale_loss: AmorLIP: the objective carries the factor tau
        calculate_full: AmorLIP: over the global batch
        learn_logit_scale: AmorLIP: the temperature is learned
        rho_list: AmorLIP's rho for equal parts of the run, as in '[8.5 -8.5]'
        datacomp_dir: AmorLIP: --eval-data-dir, with the tasks of Flickr and MSCOCO
        dataset_type: --data-format; synthetic: random images, --train-data synthetic:N
        skip_scheduler: --lr-scheduler const --warmup 0
        delete_previous_checkpoint: --save-frequency 0, only the latest checkpoint stays
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
    scale_loss: Switch = False
    calculate_full: Switch = False
    learn_logit_scale: Switch = False
    rho_list: Annotated[str | None, arg(help_behavior_hint="", metavar="LIST")] = None
    datacomp_dir: Annotated[str | None, arg(help_behavior_hint="", metavar="DIR")] = None
    dataset_type: Annotated[
        Literal["webdataset", "csv", "synthetic", "auto"] | None,
        arg(help_behavior_hint="", metavar="{webdataset,csv,synthetic,auto}"),
    ] = None
    skip_scheduler: Switch = False
    delete_previous_checkpoint: Switch = False

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
    "scale_loss": False,
    "calculate_full": False,
    "learn_logit_scale": False,
}

RETRIEVAL_TASKS = (
    "retrieval/flickr_1k_test_image_text_retrieval,"
    "retrieval/mscoco_2014_5k_test_image_text_retrieval"
)
"""What AmorLIP's training evaluates of --datacomp_dir."""

Tree = dict[str, Any]
"""The values of a command line by section and key."""


@dataclass(frozen=True)
class MethodChoice:
    """The method that a command line selects.

    Attributes:
        method: its name; none: the line selects none, and the configuration decides.
        published: whether the line selects it by the switches of published trainers.
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
    note = (
        f"method {DEFAULT_METHOD}, the default: no flag here selects another (open_clip's own "
        "objective: --method openclip)"
    )
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
        lines.append("any method, openclip among them: --method NAME")
        raise UserError("\n".join([f"{text} selects no method; these do", *lines]))
    notes = () if method else (f"method {name}, selected by {text}",)
    return MethodChoice(name, published=True, notes=notes)


def translate(given: Mapping[str, object], top: Tree) -> list[str]:
    """Turns published flags that spell a setting into settings.

    Args:
        given: the flags of `PublishedFlags` on the line.
        top: the other flags on the line; the settings are added to it.

    Returns:
        What the user should know.

    Raises:
        UserError: a flag contradicts the flag of the setting.
    """
    notes: list[str] = []
    for name, spelled in SPELLED.items():
        if name in given:
            notes += spelled(given[name], top)
    return notes


def _dataset_type(value: object, top: Tree) -> list[str]:
    data = top.setdefault("data", {})
    own = data.get("data_format", value)
    if own != value:
        raise UserError(
            f"--dataset-type {value} and --data-format {own} set the same thing: leave one out"
        )
    if value != "synthetic":
        data["data_format"] = value
        return []
    data.pop("data_format", None)
    if "train_data" not in data:
        if data.get("train_num_samples") is None:
            raise UserError("--dataset-type synthetic needs --train-num-samples, pairs of an epoch")
        data["train_data"] = f"synthetic:{data['train_num_samples']}"
    return [f"--dataset-type synthetic: random images and captions, {data['train_data']}"]


def _skip_scheduler(value: object, top: Tree) -> list[str]:
    top.setdefault("optim", {}).update(lr_scheduler="const", warmup=0)
    return ["--skip-scheduler: a constant rate (--lr-scheduler const --warmup 0)"]


def _delete_previous(value: object, top: Tree) -> list[str]:
    top.setdefault("output", {})["save_frequency"] = 0
    return ["--delete-previous-checkpoint: only the latest checkpoint stays (--save-frequency 0)"]


def _rho_list(value: object, top: Tree) -> list[str]:
    """Rho by parts of the run, as AmorLIP indexes them: two values at most, one change."""
    numbers = [float(word) for word in re.split(r"[\s,]+", str(value).strip("[] "))]
    changes = [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1]]
    if len(changes) > 1:
        raise UserError(f"--rho-list {value}: rho changes at most once here")
    late = changes[0] if changes else 0
    epochs = top.get("optim", {}).get("epochs", 32)
    first = late * (epochs // len(numbers))
    own = {"rho": numbers[0], "late_rho": numbers[-1], "late_rho_epoch": first}
    settings = top.setdefault("method", {})
    settings |= {key: own[key] for key in own if key not in settings}
    return [f"--rho-list {value}: rho {numbers[0]:g}, and {numbers[-1]:g} from epoch {first} on"]


def _datacomp_dir(value: object, top: Tree) -> list[str]:
    evaluation = top.setdefault("evaluation", {})
    evaluation.setdefault("eval_data_dir", value)
    evaluation.setdefault("eval_tasks", RETRIEVAL_TASKS)
    return [
        f"--datacomp-dir {value}: --eval-data-dir, evaluated on retrieval as AmorLIP does "
        "(--eval-tasks chooses others)"
    ]


SPELLED: Mapping[str, Callable[[object, Tree], list[str]]] = {
    "dataset_type": _dataset_type,
    "skip_scheduler": _skip_scheduler,
    "delete_previous_checkpoint": _delete_previous,
    "rho_list": _rho_list,
    "datacomp_dir": _datacomp_dir,
}
"""Flags that spell settings in another way; each changes the tree and returns notes."""


def _flags(given: Mapping[str, object]) -> str:
    return " ".join(flag_text(key, value) for key, value in given.items()) or "(none of these)"


def flag_text(key: str, value: object) -> str:
    """A published flag as it is typed."""
    flag = "--" + key.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
