"""The one reader of YAML: plain values of bounded size, and errors in one line. Imports no torch.

A file or a checkpoint of somebody else may be made to fill the memory (aliases of aliases), to
exhaust the stack (deep nesting) or to hold a number of many digits. Such text is refused. PyYAML's
safe loader builds plain values only, and runs no code.
"""

from typing import Any, cast

import yaml

from neuclip.errors import UserError, printable

LARGEST = 1_000_000
"""Characters, or bytes, of a text."""
_NODES = 100_000
"""Values with every alias written out."""
_DEPTH = 32
_DIGITS = 40
"""Of a whole number; more than any setting has, and what Python prints and converts quickly."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without huge whole numbers."""


_FastLoader = cast(
    "type[_Loader]", type("_FastLoader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
)
"""The same on libyaml, if PyYAML has it: ten times as fast, with errors that are less exact."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _DIGITS:
        what = f"a number of {len(node.value):,} characters (at most {_DIGITS})"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_FastLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml_text(text: str | bytes, place: str) -> Any:  # noqa: ANN401  any plain value
    """The value of a YAML text.

    Args:
        text: the text, or its bytes in UTF-8.
        place: what holds the text, for messages.

    Raises:
        UserError: it is not YAML, is larger or nested deeper than any configuration, or asks for
            Python objects; one line.
    """
    if len(text) > LARGEST:
        raise UserError(f"{place} has more than {LARGEST:,} characters, which no configuration has")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        try:
            return _read(text, place, _FastLoader)
        except yaml.YAMLError:
            return _read(text, place, _Loader)  # says what is wrong, and where
    except yaml.YAMLError as error:
        raise UserError(f"{place} is not YAML: {_one_line(error)}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # Values that do not fit their tags, such as a date with a month 13 or `!!bool perhaps`.
        raise UserError(f"{place} is not YAML: {printable(str(error), 200)}") from None


def _read(text: str, place: str, loader: type[_Loader]) -> object:
    _check_size(text, place, loader)
    return yaml.load(text, loader)


def _check_size(text: str, place: str, loader: type[_Loader]) -> None:
    """Counts values and nesting before any value is made.

    Raises:
        UserError: a limit is exceeded, or an alias stands inside of what it names.
    """
    count = _Count(place)
    for event in yaml.parse(text, loader):
        count.add(event)
        if len(count.opened) > _DEPTH:
            raise UserError(f"{place} is nested deeper than {_DEPTH} levels")
        if count.nodes > _NODES:
            raise UserError(f"{place} holds more than {_NODES:,} values, aliases written out")


class _Count:
    """The number of values up to an event of the parser, with every alias written out.

    Attributes:
        nodes: number of values.
        opened: anchor of each collection that is not closed yet, and the values before it.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._sizes: dict[str | None, int] = {}
        self.nodes = 0
        self.opened: list[tuple[str | None, int]] = []

    def add(self, event: yaml.Event) -> None:
        """Counts an event."""
        if isinstance(event, yaml.AliasEvent):
            self._add_alias(event.anchor)
        elif isinstance(event, yaml.CollectionStartEvent):
            self.opened.append((event.anchor, self.nodes))
            self.nodes += 1
        elif isinstance(event, yaml.ScalarEvent):
            self.nodes += 1
            self._sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.opened.pop()
            self._sizes[anchor] = self.nodes - before

    def _add_alias(self, anchor: str) -> None:
        if anchor in (opened for opened, _ in self.opened):
            raise UserError(
                f"{self._place}: the alias *{printable(anchor)} stands inside of what it names"
            )
        self.nodes += self._sizes.get(anchor, 0)


def _one_line(error: yaml.YAMLError) -> str:
    """A parser's error without its excerpt of the text."""
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return printable(str(problem), 200) + where
