"""The Dockerfile, checked without Docker, and the file that says how to cite.

`scripts/check_wheel.sh` builds the wheel and runs it.
"""

import re
import tomllib
from pathlib import Path

import yaml

from neuclip import __version__

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD", "ENV", "ARG", "LABEL"}


def instructions():
    """Pairs of instruction and arguments, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_instructions_are_known_and_the_base_is_pinned():
    found = instructions()
    assert found[0][0] == "FROM" and {name for name, _ in found} <= KNOWN
    image, _, tag = found[0][1].partition(":")
    assert image and re.match(r"\d+\.\d+", tag)
    python = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert tag.startswith(python[1])


def test_files_that_are_copied_exist_and_are_not_ignored():
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = [path for name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]]
    assert copied and set(copied) == kept
    assert all((ROOT / path).exists() for path in copied)


def test_versions_are_those_of_the_constraints_and_nothing_runs_as_root():
    found = instructions()
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert installs and all("--constraint constraints.txt" in rest for rest in installs)
    extras = re.search(r'"\.\[([\w,]+)\]"', installs[0])[1].split(",")
    optional = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{extra} = ", optional, flags=re.M) for extra in extras)
    names = [name for name, _ in found]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert dict(found)["USER"] != "root"


def test_every_apt_list_is_removed_again():
    for name, rest in instructions():
        if name == "RUN" and "apt-get update" in rest:
            assert "--no-install-recommends" in rest
            assert rest.rstrip().endswith("rm -rf /var/lib/apt/lists/*")


def test_all_files_state_one_version():
    """The package, its metadata, the citation, and the newest section of the changelog."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    ahead, *released = re.findall(r"^## (.+)$", changes, flags=re.M)
    assert ahead == "Unreleased"
    assert released[0] == f"{__version__} - {found['date-released']}"
    assert project["version"] == found["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= found.keys()
