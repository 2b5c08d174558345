"""Gathers the wheels that a GPU machine without network lacks, into one folder.

    python scripts/gather_wheels.py --out .wheels --present FILE

The machine is expected to have torch, torchvision and Triton. `--present` names a text file with
its packages, one a line as `pip freeze` or `pip list` prints them: what it has is not gathered.
Versions are those of constraints.txt. There, without network:

    python -m pip install --no-index --no-deps --no-compile --target /tmp/site .wheels/*.whl
    PYTHONPATH=/tmp/site scripts/gpu_check.sh
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BROUGHT = frozenset({"torch", "torchvision", "triton"})
"""What the machine has with torch; with them come NVIDIA's packages, and those of CPU builds."""
TESTS = ("pytest", "beartype")
TRAINER = ("webdataset==0.2.86", "pandas", "ftfy")
"""open_clip's trainer, beside what neuclip needs."""
GLIBC = range(5, 40)
"""pip takes a platform tag as it is written: the versions of glibc are named one by one."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels")
    parser.add_argument("--python-version", default="3.12")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--present", type=Path, help="packages that the machine has, one a line")
    parser.add_argument("--without-trainer", action="store_true", help="leave open_clip's trainer")
    parser.add_argument("--limit", type=int, default=60, help="largest size of all wheels in MiB")
    parser.add_argument("--list", action="store_true", help="only print what would be gathered")
    return parser.parse_args()


def plain(name: str) -> str:
    """The name of a package as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def own_requirements() -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def lacking(
    wanted: Iterable[Requirement], there: Mapping[str, str | None], python_version: str
) -> list[str]:
    """The packages, and all that they need on Linux, that a machine lacks or has in an old version.

    Args:
        wanted: what is asked for; its needs are those of the packages installed here.
        there: versions by package; none: unknown, and taken as new enough.
        python_version: of the machine.
    """
    here = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    here |= {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        each = waiting.pop()
        name = plain(each.name)
        if name in found or (each.marker is not None and not each.marker.evaluate(here)):
            continue
        version = there.get(name)
        if name in there and (
            version is None or each.specifier.contains(version, prereleases=True)
        ):
            continue
        found.add(name)
        waiting += _needs(name)
    return sorted(found)


def _needs(name: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return []  # not installed here: pip takes the wheel, and its needs are named in TRAINER


def versions() -> dict[str, str]:
    """The versions of constraints.txt, by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if "==" in line]
    return {plain(name): f"=={version}" for name, version in pinned}


def present(path: Path | None) -> dict[str, str | None]:
    """The versions in a list of `pip freeze` or `pip list`, by package; none where it has none."""
    found: dict[str, str | None] = dict.fromkeys(BROUGHT)
    if path is None:
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        if words := re.split(r"[=\s]+", line.strip()):
            found[plain(words[0])] = (
                words[1] if len(words) > 1 and words[0] not in BROUGHT else None
            )
    return found


def chosen(args: argparse.Namespace) -> list[str]:
    """The packages to download, at the versions of constraints.txt or of TRAINER."""
    extra = [Requirement(name) for name in (*TESTS, *(() if args.without_trainer else TRAINER))]
    names = lacking([*own_requirements(), *extra], present(args.present), args.python_version)
    pins = {plain(each.name): str(each.specifier) for each in extra} | versions()
    return [name + pins.get(name, "") for name in names]


def download(requirements: Sequence[str], args: argparse.Namespace) -> None:
    """Wheels for the machine; without their needs, which are named on their own.

    Raises:
        SystemExit: there is no such wheel; pip's message names it.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    words += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    words += ["--python-version", args.python_version, "--dest", str(args.out)]
    for minor in GLIBC:
        words += ["--platform", f"manylinux_2_{minor}_{args.machine}"]
    words += ["--platform", f"manylinux2014_{args.machine}"]
    done = subprocess.run([*words, *requirements], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        where = f"Python {args.python_version} on {args.machine}"
        raise SystemExit(f"a wheel for {where} is missing: {' '.join(last)}")


def main() -> None:
    """Gathers the wheels, or lists them."""
    args = arguments()
    requirements = chosen(args)
    print("\n".join(requirements))
    if args.list:
        return
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    download(requirements, args)
    sizes = {path.name: path.stat().st_size for path in args.out.glob("*.whl")}
    total = sum(sizes.values()) / 2**20
    print(f"{len(sizes)} wheels, {total:.1f} MiB in {args.out}")
    if total > args.limit:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        raise SystemExit(
            f"{total:.1f} MiB exceed --limit {args.limit}; the largest are "
            + ", ".join(f"{name} ({sizes[name] / 2**20:.1f})" for name in largest)
            + ". Name what the machine has with --present, or add --without-trainer"
        )


if __name__ == "__main__":
    main()
