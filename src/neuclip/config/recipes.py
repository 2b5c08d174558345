"""Configuration files and recipes as trees of plain values. Imports no torch."""

from pathlib import Path
from typing import Any

from neuclip.config.bounded_yaml import LARGEST, read_yaml_text
from neuclip.errors import UserError, nearest, printable
from neuclip.files import describe
from neuclip.untrusted import open_regular

RECIPES = Path(__file__).parents[1] / "recipes"
RENAMED = {"demo-neuclip-published": "demo-neuclip"}


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a file and lays it over the recipe that its key `base` names."""
    tree = read_yaml(path)
    base = tree.pop("base", None)
    return tree if base is None else merge(read_recipe(recipe_path(str(base))), tree)


def recipe_path(name: str) -> Path:
    """The file of a recipe in the package.

    Raises:
        UserError: no recipe has that name; the message lists the names.
    """
    names = recipe_names()
    if name in RENAMED:
        raise UserError(f"recipe {name!r} is called {RENAMED[name]!r} now")
    if name not in names:
        raise UserError(f"unknown recipe {name!r}; {nearest(name, names)}")
    return RECIPES / f"{name}.yaml"


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Lays `top` over `base`, section by section.

    A section `method` of another name replaces the one below: settings do not leak between methods.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            other = key == "method" and value.get("name", below.get("name")) != below.get("name")
            merged[key] = dict(value) if other else merge(below, value)
        else:
            merged[key] = value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a configuration file as a tree.

    Raises:
        UserError: the file is missing, is not YAML, is too large or too deep, or is not a
            mapping.
    """
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        raise UserError(f"configuration {printable(str(path), 200)}: {describe(error)}") from None
    tree = read_yaml_text(content, f"configuration {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path}: expected sections, found {type(tree).__name__}")
    return tree
