"""README cannot go stale: its table and its tree are compared with the code."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_the_catalogues():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script("readme_methods").with_table(readme) == readme


def test_files_named_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("```")[1]
    names = {word.strip(",") for word in tree.split() if word.strip(",").endswith(".py")}
    here = {path.name for path in (ROOT / "src" / "neuclip").rglob("*.py")}
    assert len(names) > 20
    assert names <= here


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target
