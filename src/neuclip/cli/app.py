"""The command line: `neuclip COMMAND`. A command imports itself what needs torch."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import Positional, arg

from neuclip import __version__
from neuclip.catalogue.registry import method_info
from neuclip.cli import terminal
from neuclip.cli.data import Bench, Inspect, Pack, bench_data, inspect_data, pack_data
from neuclip.cli.eval import Download, Eval, download, evaluate
from neuclip.cli.export import ExportCommand, export
from neuclip.cli.options import Switch
from neuclip.cli.report import Report, report
from neuclip.cli.search import Search, search
from neuclip.cli.train import DEFAULT_METHOD, parse_train
from neuclip.config.batch_size import describe_step, share_batch
from neuclip.config.run_config import RunConfig
from neuclip.errors import OtherProcessFailed, Preempted, UserError, nearest
from neuclip.parallel.launch import launch_environment

T = TypeVar("T")
MethodName = Annotated[str, arg(metavar="NAME")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code.

    Raises:
        SystemExit: tyro printed a help (0) or refused a flag (2).
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        terminal.say(str(error))
        return 2
    except OtherProcessFailed:
        return 1  # the log says which, and why
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader left (`neuclip methods | head`): let the flush at exit find an open stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] == "--version":
        print(f"neuclip {__version__}")
        return 0
    if not argv or argv[0] in {"-h", "--help"}:
        print(_overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return COMMANDS[name].run(argv[words:])
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    given = " ".join(argv[: 2 if argv[0] in groups else 1])
    raise UserError(f"unknown command {given!r}; {nearest(given, list(COMMANDS))}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: neuclip COMMAND ...",
            "",
            "CLIP training with learned log-normalizers, for people with few GPUs.",
            "",
            *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            "neuclip COMMAND --help shows the options of a command; neuclip --version the version.",
        ]
    )


def _call(function: Callable[..., T], argv: Sequence[str], prog: str) -> T:
    """Calls a function with what the flags say; its docstring is the help."""
    return tyro.cli(function, args=list(argv), prog=f"neuclip {prog}")


# train ------------------------------------------------------------------------------------------


def _train(argv: Sequence[str]) -> int:
    command = parse_train(argv)
    launch = launch_environment()
    for note in command.notes if launch.rank == 0 else ():
        terminal.say(note)
    if command.dry_run:
        shared = share_batch(command.config, launch.world_size)
        if launch.rank == 0:
            print(f"# pairs per step: {describe_step(shared, launch.world_size)}")
            print(command.config.to_yaml(), end="")
        return 0
    _fit(command.config)
    return 0


def _fit(config: RunConfig) -> Path:
    """Trains; a run that was asked to stop says by its exit code that it is not finished."""
    from neuclip.training.assemble import train

    try:
        return train(config)
    except Preempted as stop:
        terminal.say(str(stop))
        raise SystemExit(stop.exit_code) from None


# data demo, demo ----------------------------------------------------------------------------------


def _data_demo(
    out: Path,
    fonts: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR ...]", help_behavior_hint="")] = (),
    size: int = 32,
    seed: int = 0,
    overwrite: Switch = False,
) -> int:
    """Build the embedded data: pictures of characters with their Unicode names, as tar shards.

    Args:
        out: folder to make
        fonts: folders with more fonts to draw from
        size: width and height of the pictures in pixels
        seed: seed of captions and splits
        overwrite: build again over an older build
    """
    from neuclip.data.demo.build import build_demo

    with terminal.progress() as progress:
        summary = build_demo(
            out, fonts=fonts, size=size, seed=seed, overwrite=overwrite, progress=progress
        )
    for split, pairs in summary.pairs.items():
        print(f"{split:16}  {pairs:7,} pairs  {summary.classes[split]:6,} names")
    print(f"in {summary.path}" + (" (was there already)" if summary.reused else ""))
    return 0


def _demo(
    method: MethodName = DEFAULT_METHOD,
    out: Path = Path("neuclip-demo"),
    seed: int = 0,
    epochs: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the recipe's)")
    ] = None,
    smoke: Switch = False,
) -> int:
    """Build the embedded data, train, judge and report: minutes on two CPU cores.

    Args:
        method: training method, see `neuclip methods`
        out: folder of everything that is made
        seed: seed of the run
        epochs: length of the run
        smoke: a few characters and 20 steps, in seconds: does everything work here?
    """
    method_info(method)
    from neuclip.data.demo.build import build_demo, tiny_demo
    from neuclip.report import write_report

    data, runs = out / "data", out / "runs"
    flags = ["--recipe", f"demo-{method}", "--seed", str(seed)]
    flags += ["--train-data", str(data / "train"), "--logs", str(runs)]
    flags += ["--val-data", f"{data / 'unseen_face'}::{data / 'unseen_character'}"]
    flags += ["--name", fresh_name(runs, f"demo-{method}")]
    flags += ["--epochs", str(epochs)] if epochs is not None else []
    flags += ["--smoke"] if smoke else []
    config = parse_train(flags).config
    print(f"1/3  embedded data in {data}", flush=True)
    if smoke:
        tiny_demo(data)
    else:
        with terminal.progress() as progress:
            build_demo(data, progress=progress)
    print(f"2/3  training {method} for {config.optim.epochs} epochs", flush=True)
    run = _fit(config)
    print("3/3  report", flush=True)
    page = write_report([run], run / "report.html")
    terminal.print_demo(run, config.optim.stop_epochs or config.optim.epochs, page)
    return 0


def fresh_name(runs: Path, name: str) -> str:
    """The name, numbered if a run of that name exists."""
    number, fresh = 1, name
    while (runs / fresh).exists():
        number += 1
        fresh = f"{name}-{number}"
    return fresh


# methods ----------------------------------------------------------------------------------------


def _methods(
    name: Annotated[
        Positional[str | None], arg(metavar="[NAME]", help_behavior_hint="(default: all)")
    ] = None,
) -> int:
    """List the training methods, or show one: formula, settings and paper.

    Args:
        name: a method
    """
    if name is None:
        terminal.print_methods()
    else:
        terminal.print_method(method_info(name))
    return 0


@dataclass(frozen=True)
class Command:
    """A command of the program."""

    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        "build the embedded data, train, judge and report: minutes on a laptop",
        lambda argv: _call(_demo, argv, "demo"),
    ),
    "train": Command("train a model; takes the published command lines", _train),
    "eval": Command(
        "judge a checkpoint on evaluation splits or DataComp's tasks",
        lambda argv: evaluate(_call(Eval, argv, "eval")),
    ),
    "report": Command(
        "compare runs on one HTML page",
        lambda argv: report(_call(Report, argv, "report")),
    ),
    "export": Command(
        "write trained towers for open_clip or Hugging Face",
        lambda argv: export(_call(ExportCommand, argv, "export")),
    ),
    "search": Command(
        "find pictures by text or picture, on a local web page",
        lambda argv: search(_call(Search, argv, "search")),
    ),
    "methods": Command(
        "list the training methods, or show one", lambda argv: _call(_methods, argv, "methods")
    ),
    "data download-evalsets": Command(
        "fetch DataComp's evaluation sets",
        lambda argv: download(_call(Download, argv, "data download-evalsets")),
    ),
    "data demo": Command(
        "build the embedded data", lambda argv: _call(_data_demo, argv, "data demo")
    ),
    "data inspect": Command(
        "show what data hold: sizes, captions, damage, examples",
        lambda argv: inspect_data(_call(Inspect, argv, "data inspect")),
    ),
    "data pack": Command(
        "write any data as tar shards with a manifest",
        lambda argv: pack_data(_call(Pack, argv, "data pack")),
    ),
    "data bench": Command(
        "time reading, decoding, resizing, tokenizing: what limits?",
        lambda argv: bench_data(_call(Bench, argv, "data bench")),
    ),
}
