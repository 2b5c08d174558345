"""`neuclip methods`: the training methods with formula, settings, flags and paper."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from neuclip.catalogue.additions import ADDITIONS
from neuclip.catalogue.fields import bounds, default_text
from neuclip.catalogue.method_info import MethodInfo
from neuclip.catalogue.registry import DEFAULT_METHOD, METHODS, method_info
from neuclip.cli.flag_table import table
from neuclip.cli.terminal import print_line, print_plain


@dataclass(frozen=True)
class Methods:
    """List the training methods, or show one: formula, settings and paper."""

    name: Annotated[
        Positional[str | None], arg(metavar="[NAME]", help_behavior_hint="(default: all)")
    ] = None
    """a method"""


def show_methods(command: Methods) -> int:
    """Prints the catalogue, or one method.

    Raises:
        UserError: the method is unknown.
    """
    if command.name is None:
        _print_catalogue()
    else:
        _print_method(method_info(command.name))
    return 0


def _print_catalogue() -> None:
    """Each method with its summary, its normalizer, its state and its paper."""
    width = max(len(info.name) for info in METHODS.values()) + 2
    for info in METHODS.values():
        default = " (the default)" if info.name == DEFAULT_METHOD else ""
        print_line(f"{info.name:{width}}{info.summary}{default}", bold=len(info.name), hang=width)
        for fact in (f"normalizer: {info.normalizer}", f"state: {info.state}", info.paper):
            print_line(" " * width + fact, hang=width)
    print_line("\nBeside the loss of any method", bold=30)
    for addition in ADDITIONS:
        print_line(f"{addition.flag}: {addition.summary}", bold=len(addition.flag), hang=width)
        for fact in (f"state: {addition.state}", addition.paper):
            print_line(" " * width + fact, hang=width)
    print_line("\nneuclip methods NAME shows the formula and the settings of a method.")


def _print_method(info: MethodInfo) -> None:
    """One method: formula, settings and paper."""
    print_line(f"{info.name}: {info.summary}", bold=len(info.name))
    print_line("\nFormula", bold=8)
    for line in info.formula.splitlines():
        print_plain(line)
    print_line(f"\n  normalizer: {info.normalizer}", hang=4)
    print_line(f"  state: {info.state}", hang=4)
    print_line("\nSettings (default; range)", bold=9)
    for flag in table():
        if flag.path[0] == "method" and info.name in flag.fields:
            field = flag.fields[info.name]
            values = "; ".join(filter(None, [default_text(field), bounds(field)]))
            flags = ", ".join(flag.names_for(info.name))
            print_line(f"  {flag.path[1]} = {values}", bold=2 + len(flag.path[1]))
            print_line(f"      {field.description or ''}", hang=6)
            print_line(f"      {flags}", hang=6)
    if info.statements:
        _print_statements(info)
    print_line("\nPaper", bold=6)
    print_line(f"  {info.paper}", hang=2)


def _print_statements(info: MethodInfo) -> None:
    """What the paper states, then our readings with the flag of the other one."""
    print_line("\nStated by the paper", bold=20)
    for statement in (each for each in info.statements if not each.settled_by):
        print_line(f"  - {statement.what}", hang=4)
    print_line("\nOur readings", bold=13)
    for statement in (each for each in info.statements if each.settled_by):
        print_line(f"  - {statement.what} ({statement.setting})", hang=4)
        print_line(f"    the other reading: {statement.other}", hang=4)
        print_line(f"    settled by: {statement.settled_by}", hang=4)
