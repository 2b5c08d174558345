"""`neuclip demo` and `neuclip data demo`: the demo data, and a first run on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from neuclip.catalogue.registry import DEFAULT_METHOD, method_info
from neuclip.cli import terminal
from neuclip.cli.eval import Eval, evaluate_own_splits
from neuclip.cli.options import Switch
from neuclip.cli.train import parse_train
from neuclip.config.recipes import recipe_names
from neuclip.errors import Preempted, UserError, quantity
from neuclip.run_folder import RunFolder


@dataclass(frozen=True)
class DataDemo:
    """Build the demo data: images of characters with their Unicode names, as tar shards."""

    out: Path
    """folder to write to"""
    fonts: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR ...]", help_behavior_hint="")] = ()
    """folders with additional fonts"""
    size: int = 32
    """width and height of the images in pixels"""
    seed: int = 0
    """seed of captions and splits"""
    overwrite: Switch = False
    """replace an older build"""


def build_data(command: DataDemo) -> int:
    """Builds the data and prints the size of each split.

    Raises:
        UserError: the size is out of range, or the folder cannot be written to.
    """
    from neuclip.data.demo.build import build_demo

    with terminal.progress() as progress:
        summary = build_demo(
            command.out,
            fonts=command.fonts,
            size=command.size,
            seed=command.seed,
            overwrite=command.overwrite,
            progress=progress,
        )
    for split, pairs in summary.pairs.items():
        floor = summary.floors.get(split)
        said = "" if floor is None else f"  {floor:.1%} top-1 without learning"
        print(f"{split:28}  {pairs:7,} pairs  {summary.classes[split]:6,} names{said}")
    print(f"in {summary.path}" + (" (already built)" if summary.reused else ""))
    return 0


@dataclass(frozen=True)
class Demo:
    """Build the demo data, train, evaluate and report: minutes on two CPU cores."""

    method: Annotated[str, arg(metavar="NAME")] = DEFAULT_METHOD
    """training method, see `neuclip methods`"""
    out: Path = Path("neuclip-demo")
    """folder for data, run and report"""
    seed: int = 0
    """seed of the run"""
    epochs: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the recipe's)")
    ] = None
    """length of the run"""
    smoke: Switch = False
    """check the installation in seconds: a few characters and 20 steps"""


def demo(command: Demo) -> int:
    """Builds the data, trains, writes the report and prints the accuracy on held-out data.

    Training watches the development splits; the test splits are read once, after it.

    Raises:
        UserError: the method is unknown, or an option is out of range.
    """
    method_info(command.method)
    from neuclip.data.demo.build import build_demo, tiny_demo
    from neuclip.report import write_report

    data, runs = command.out / "data", command.out / "runs"
    flags = train_flags(command, data, runs)
    config = parse_train(flags).config
    if config.optim.epochs == 0:
        raise UserError(
            "--epochs 0 leaves nothing to evaluate: give 1 or more; `neuclip data demo` builds the "
            "data alone"
        )
    print(f"1/4  demo data in {data}", flush=True)
    if command.smoke:
        tiny_demo(data)
    else:
        with terminal.progress() as progress:
            build_demo(data, progress=progress)
    print(
        f"2/4  training {command.method} for {quantity(config.optim.epochs, 'epoch')}", flush=True
    )
    from neuclip.training.assemble import train

    try:
        folder = RunFolder(train(config))
    except Preempted as stop:
        stop.argv = ["train", *flags]
        raise
    print("3/4  test splits", flush=True)
    workers, device = config.data.workers, config.device
    test = Eval(val_data=_splits(data, "test"), workers=workers, device=device)
    evaluate_own_splits(test, folder.path)
    print("4/4  report", flush=True)
    page = write_report([folder.path], folder.report)
    terminal.print_demo(folder, config.optim.stop_epochs or config.optim.epochs, page)
    return 0


def train_flags(command: Demo, data: Path, runs: Path) -> list[str]:
    """The command line of `neuclip train` that the demo runs.

    A method without a recipe of its own, such as one from outside the package, has its defaults.
    """
    recipe = f"demo-{command.method}"
    known = recipe in recipe_names()
    flags = ["--recipe", recipe] if known else ["--recipe", "demo", "--method", command.method]
    flags += ["--seed", str(command.seed), "--train-data", str(data / "train"), "--logs", str(runs)]
    flags += ["--val-data", _splits(data, "development")]
    flags += ["--name", fresh_name(runs, f"demo-{command.method}")]
    flags += ["--epochs", str(command.epochs)] if command.epochs is not None else []
    flags += ["--smoke"] if command.smoke else []
    return flags


def _splits(data: Path, part: str) -> str:
    """The evaluation splits for `development` or `test`, as `--val-data` takes them."""
    return f"{data / f'unseen_face_{part}'}::{data / f'unseen_character_{part}'}"


def fresh_name(runs: Path, name: str) -> str:
    """The name, numbered if a run of that name exists."""
    number, fresh = 1, name
    while (runs / fresh).exists():
        number += 1
        fresh = f"{name}-{number}"
    return fresh
