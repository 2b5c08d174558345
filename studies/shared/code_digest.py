"""A digest of all code that decides the numbers of a run, by import closure.

The digest covers the modules that a run imports: the entry points, what they import within
`neuclip` and `studies`, what that imports, and so on. Imports inside functions count, as long as
the function is not the `__getattr__` of a package, which loads names for users of the package.
Imports for type checkers do not count.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import neuclip

_STUDIES = Path(__file__).parents[1]
PACKAGES = {"neuclip": Path(neuclip.__file__).parent, "studies": _STUDIES}
"""Folders of the packages whose code is covered, by name."""

TRAINING = ("neuclip.training.assemble", "neuclip.model.load", "neuclip.evaluation.evaluate")
"""The entry points of a training run and of its evaluation."""
MODELS = ("neuclip/model/model_configs/*.json",)
"""Files that are no modules but decide numbers, as patterns: the models."""


def code_digest(
    entries: Iterable[str] = TRAINING,
    data: Iterable[str] = MODELS,
    packages: dict[str, Path] | None = None,
) -> str:
    """A digest of the code that decides the numbers: the definitions in the import closure.

    Equal for code that differs in comments, docstrings, annotations, layout and imports only, or
    whose definitions moved from one module of the closure to another. A renamed variable changes
    it.

    Args:
        entries: the modules that a run starts with.
        data: patterns of other files, each with its package first.
        packages: folders of the packages, by name.
    """
    packages = packages or PACKAGES
    paths = import_closure(entries, packages).values()
    statements = [text for path in paths for text in _statements(path)]
    for pattern in data:
        package, _, rest = pattern.partition("/")
        statements += [path.read_text(encoding="utf-8") for path in packages[package].glob(rest)]
    return hashlib.sha256("\0".join(sorted(statements)).encode()).hexdigest()[:12]


def import_closure(
    entries: Iterable[str], packages: dict[str, Path] | None = None
) -> dict[str, Path]:
    """The files of all modules that the entries import, directly or not, by module."""
    packages = packages or PACKAGES
    found: dict[str, Path] = {}
    waiting = list(entries)
    while waiting:
        parts = waiting.pop().split(".")
        for length in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b too
            module = ".".join(parts[:length])
            path = _file_of(module, packages)
            if path is not None and module not in found:
                found[module] = path
                waiting += _imported(path.read_text(encoding="utf-8"))
    missing = sorted(set(entries) - set(found))
    if missing:
        raise ValueError(f"no such module: {', '.join(missing)}")
    return found


def _file_of(module: str, packages: dict[str, Path]) -> Path | None:
    """The file of a module of the packages; None if the name is of something else."""
    package, *rest = module.split(".")
    if package not in packages:
        return None
    path = packages[package].joinpath(*rest)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@functools.cache
def _imported(text: str) -> tuple[str, ...]:
    """The names that a module's text imports; of `from a import b`, both a and a.b."""
    return tuple(_names_imported(ast.parse(text)))


def _names_imported(tree: ast.Module) -> Iterator[str]:
    waiting: list[ast.AST] = [
        node
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
    ]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _for_type_checkers(node):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{each.name}" for each in node.names)
        waiting += ast.iter_child_nodes(node)


def _for_type_checkers(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(path: Path) -> Iterator[str]:
    """The top-level statements of a file, without what decides nothing."""
    yield from _dumped(path.read_text(encoding="utf-8"))


@functools.cache
def _dumped(text: str) -> tuple[str, ...]:
    return tuple(map(ast.dump, _Deciding().visit(ast.parse(text)).body))


class _Deciding(ast.NodeTransformer):
    """Drops docstrings, imports and the annotations of functions."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node
