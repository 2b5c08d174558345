"""The table of training methods. Imports no torch.

The command line, configuration files, `neuclip methods`, the documentation and
`neuclip.create_loss` all read this table. A method is added by one file that calls `register`:
in this package (`_FAMILIES` lists its modules), or outside. A file outside is imported when the
environment variable `NEUCLIP_METHODS` names it (modules or .py files, joined by commas), or when an
installed package has an entry point in the group `neuclip.methods`.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import reprlib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

from pydantic import PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from neuclip.catalogue import (
    amorlip,
    fastclip,
    infonce_queue,
    moco,
    neuclip,
    openclip,
    rgcl_queue,
    scent,
    siglip,
    sogclr,
)
from neuclip.catalogue.method_info import MethodInfo
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.errors import UserError, nearest
from neuclip.method.choices import BatchOption

_FAMILIES = (
    openclip,
    infonce_queue,
    moco,
    siglip,
    fastclip,
    rgcl_queue,
    sogclr,
    scent,
    amorlip,
    neuclip,
)

DEFAULT_METHOD = "neuclip_pool"
"""What `neuclip train` trains where nothing chooses a method."""
ENVIRONMENT = "NEUCLIP_METHODS"
ENTRY_POINTS = "neuclip.methods"

_table: dict[str, MethodInfo] = {}
_failures: list[str] = []
METHODS: Mapping[str, MethodInfo] = MappingProxyType(_table)
"""The methods by name, in the order of lists."""


def register(info: MethodInfo) -> MethodInfo:
    """Adds a method to the table.

    Args:
        info: the row; `info.settings` has a field `name: Literal[...]` with the method's name.

    Returns:
        The row.

    Raises:
        UserError: another method has that name, or the row is unusable; the message names the file.
    """
    if problem := _problem_of_row(info):
        raise UserError(problem)
    known = _table.get(info.name)
    if known is not None and known.settings.__qualname__ != info.settings.__qualname__:
        raise UserError(
            f"method {info.name!r} exists already ({known.settings.__module__}); give the method "
            f"of {info.settings.__module__} another name"
        )
    _table[info.name] = info
    return info


def _problem_of_row(info: object) -> str | None:
    """What is wrong with a row of the user's, in one line with the file; none: nothing."""
    if not isinstance(info, MethodInfo):
        return f"register takes a MethodInfo, not {reprlib.repr(info)}"
    settings = info.settings
    if not _is_settings_class(settings):
        return f"settings={reprlib.repr(settings)} must be a class derived from MethodSettings"
    where = f"{settings.__name__} of {info.source}"
    field = settings.model_fields.get("name")
    if field is None or get_args(field.annotation) != (field.default,):
        return f'{where} must select the method by a field such as name: Literal["mine"] = "mine"'
    for part in ("build", "resolve"):
        if not callable(getattr(info, part)):
            return f"method {info.name!r} of {info.source}: {part} must be a function"
    try:
        settings()
    except ValidationError as error:
        problems = "; ".join(_problem(info, dict(each)) for each in error.errors())
        return f"method {info.name!r} of {info.source}, defaults{problems}"
    return None


def _is_settings_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, MethodSettings)


def method_info(name: str) -> MethodInfo:
    """The row of a method.

    Raises:
        UserError: no method has that name; the message lists the names.
    """
    check_outside()
    if name not in METHODS:
        raise UserError(unknown_method(name))
    return METHODS[name]


def method_settings(name: str, values: Mapping[str, Any]) -> MethodSettings:
    """Validates the settings of a method.

    Args:
        name: a method of the table.
        values: the settings that differ from the defaults.

    Raises:
        UserError: unknown method or setting (lists what exists), or a value out of range
            (gives the range).
    """
    info = method_info(name)
    try:
        return info.settings.model_validate({**values, "name": name})
    except ValidationError as error:
        problems = "; ".join(_problem(info, dict(each)) for each in error.errors())
        raise UserError(f"method {name!r}{problems}") from None


def check_takes(name: str, asked: Mapping[BatchOption, str]) -> None:
    """Checks that a method's loss takes what the data settings bring to it.

    Args:
        name: of the method.
        asked: the flag that asks for each option.

    Raises:
        UserError: it does not take one; the message lists the methods that do.
    """
    info = method_info(name)
    for option, flag in asked.items():
        if option not in info.takes:
            able = ", ".join(each.name for each in METHODS.values() if option in each.takes)
            raise UserError(
                f"{flag} needs a method whose loss takes {option}; {name!r} does not. These do: "
                f"{able} (--method). If {name!r} is your own and treats {option}, name it in "
                "`takes` of its MethodInfo"
            )


def _problem(info: MethodInfo, problem: dict[str, Any]) -> str:
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        known = [name for name in info.settings.model_fields if name != "name"]
        return f" has no setting {key!r}; {nearest(key, known)}"
    if not key:
        return f": {problem['msg']}"
    return f": {key}: {problem['msg']} (got {problem['input']!r})"


def _validate(value: Any) -> MethodSettings:
    """The settings class that the key `name` selects, validated."""
    if isinstance(value, MethodSettings):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("model_type", "a section is expected")
    name = str(value.get("name"))
    if name not in METHODS:
        raise PydanticCustomError("unknown_method", "unknown method")
    return METHODS[name].settings.model_validate(value)


AnyMethodSettings = Annotated[SerializeAsAny[MethodSettings], PlainValidator(_validate)]
"""The settings of any method of the table, as a field of the configuration."""


def unknown_method(name: str) -> str:
    """The message for a name that is not in the table."""
    named = os.environ.get(ENVIRONMENT)
    outside = f"{ENVIRONMENT}={named}" if named else f"methods of your own: set {ENVIRONMENT}"
    return f"unknown method {name!r}; {nearest(name, list(METHODS))} ({outside})"


def check_outside() -> None:
    """Reports the files and packages with methods of their own that could not be imported.

    Raises:
        UserError: names each of them with the reason.
    """
    if _failures:
        raise UserError("\n".join(_failures))


def _load_outside() -> None:
    """Imports the files and packages that add methods of their own."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINTS)
    names = filter(None, (name.strip() for name in os.environ.get(ENVIRONMENT, "").split(",")))
    outside = [(f"entry point {entry.value!r}", entry.load) for entry in entries]
    outside += [(f"{ENVIRONMENT} {name!r}", partial(_import, name)) for name in names]
    for label, load in outside:
        try:
            load()
        except UserError as error:  # says what is wrong with a row
            _failures.append(f"{label}: {error}")
        except ImportError as error:
            _failures.append(
                f"{label} cannot be imported ({error}); give a module on the Python path or a .py "
                "file"
            )
        except Exception as error:  # whatever a file of the user's does
            reason = next(iter(str(error).splitlines()), "")
            _failures.append(f"{label} cannot be imported ({type(error).__name__}: {reason})")


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name)
    if not path.is_file():
        raise ImportError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)


for _family in _FAMILIES:
    for _info in _family.METHODS:
        register(_info)
_load_outside()
