"""The command line: `neuclip COMMAND`. A command imports what needs torch when it runs."""

import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from neuclip import __version__, console
from neuclip.catalogue.registry import check_outside
from neuclip.cli import terminal
from neuclip.cli.blend import Blend, blend
from neuclip.cli.classify import Classify, classify
from neuclip.cli.data import Bench, Inspect, Pack, bench_data, inspect_data, pack_data
from neuclip.cli.demo import DataDemo, Demo, build_data, demo
from neuclip.cli.duplicates import DuplicatesCommand, find_duplicates
from neuclip.cli.embed import Embed, embed
from neuclip.cli.eval import Download, Eval, download, evaluate
from neuclip.cli.export import ExportCommand, export
from neuclip.cli.finetune import show_derived
from neuclip.cli.icons import EmojiPairs, Icons, build_emoji_pairs, build_icon_pairs
from neuclip.cli.method_help import Methods, show_methods
from neuclip.cli.push import Push, push
from neuclip.cli.report import Report, report, with_seconds
from neuclip.cli.runs import RunsCommand, show_runs
from neuclip.cli.score import Score, score
from neuclip.cli.search import Search, search
from neuclip.cli.train import FinetuneCommand, TrainCommand, parse_train, resume_command
from neuclip.config.batch_size import describe_step
from neuclip.config.resolve import derived, resolve
from neuclip.config.run_config import RunConfig
from neuclip.errors import OtherProcessFailed, Preempted, UserError, nearest, printable
from neuclip.files import describe, disk_error
from neuclip.interrupts import INTERRUPTED, second_interrupt_ends
from neuclip.parallel.launch import launch_environment

_REFUSED = {
    errno.EACCES,
    errno.EFBIG,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
}
"""What the operating system says of paths that are of the user's choice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code.

    Raises:
        SystemExit: tyro printed a help (0) or refused a flag (2).
    """
    with second_interrupt_ends(), console.logging_shown():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    """Runs a command line; every error that a user can fix is one message and an exit code."""
    try:
        check_outside()
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        terminal.say(str(error))
        return 2
    except Preempted as stop:
        if launch_environment().rank == 0:  # all ranks stop together
            terminal.say(f"{stop}\nto continue: {resume_command(stop.argv or argv, stop.name)}")
        return stop.exit_code
    except OtherProcessFailed:
        return 1  # the log names the process and the cause
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # the reader left (`neuclip methods | head`)
        return 141
    except Exception as error:
        cause = disk_error(error)
        if cause is not None:  # at a write that has no message of its own
            terminal.say(f"cannot write {_file_of(cause)}".rstrip() + f": {describe(cause)}")
            _drop_output()  # it may be standard output (`neuclip methods > FILE`)
            return 2
        if not isinstance(error, OSError) or error.errno not in _REFUSED or not _file_of(error):
            raise
        terminal.say(f"cannot use {_file_of(error)}: {error.strerror}")
        return 2


def _drop_output() -> None:
    """Sends what standard output still holds nowhere if it cannot be written.

    The flush at exit would fail, too.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _file_of(error: OSError) -> str:
    """The name of the file of an error, if it has one."""
    name = error.filename
    return printable(os.fsdecode(name), 200) if isinstance(name, str | bytes) else ""


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] == "--version":
        print(f"neuclip {__version__}")
        return 0
    if argv and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return COMMANDS[name].run(name, argv[words:])
    group = argv[0] if argv and argv[0] in GROUPS else ""
    rest = argv[1:] if group else argv
    if rest and rest[0] not in {"-h", "--help"}:
        given = f"{group} {rest[0]}".strip()
        known = [name for name in [*COMMANDS, *GROUPS] if name.startswith(f"{group} ".lstrip())]
        raise UserError(f"unknown command {given!r}; {nearest(given, known)}")
    print(_list_commands(group), file=sys.stdout if rest else sys.stderr)
    return 0 if rest else 2


def _list_commands(group: str) -> str:
    """The help of a group of commands; "" is the whole program."""
    program = f"neuclip {group}".strip()
    within = f"{group} " if group else ""
    commands = {name: command for name, command in COMMANDS.items() if name.startswith(within)}
    hang = max(map(len, commands)) + 4
    columns = max(60, shutil.get_terminal_size().columns)
    rows = [
        textwrap.fill(
            f"  {name:{hang - 2}}{command.summary}", columns, subsequent_indent=" " * hang
        )
        for name, command in commands.items()
    ]
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            GROUPS.get(
                group, "CLIP training with learned log-normalizers, for people with few GPUs."
            ),
            "",
            *rows,
            "",
            f"{program} COMMAND --help shows the options of a command.",
            "neuclip --version shows the version.",
        ]
    )


def train(command: TrainCommand) -> int:
    """Trains, or prints the resolved configuration (`--dry-run`)."""
    launch = launch_environment()
    for note in command.notes if launch.rank == 0 else ():
        terminal.say(note)
    if command.dry_run and command.config.derive is not None:
        return show_derived(command)
    if command.dry_run:
        config = _with_model(command.config)
        resolved = resolve(config, launch.world_size)
        if launch.rank == 0:
            optim, method = resolved.optim, resolved.method
            if optim.epochs and (reason := method.batch_only(optim.stop_epochs or optim.epochs)):
                terminal.say(reason)
            print(f"# pairs per step: {describe_step(resolved, launch.world_size)}")
            if resolved.data.global_batch_size and (
                words := method.gamma_text(resolved.data.global_batch_size)
            ):
                print(f"# gamma: {words}")
            print(derived(config).to_yaml(), end="")
        return 0
    from neuclip.training.assemble import train as start_training

    start_training(command.config)
    return 0


def _with_model(config: RunConfig) -> RunConfig:
    """The settings with the model of published weights; imports torch only to find one."""
    if config.model.pretrained is None or config.model.given_name is not None:
        return config
    from neuclip.model.starting_weights import with_model_of_weights

    return config.model_copy(update={"model": with_model_of_weights(config.model)})


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
        summary: one line for the list of commands.
        options: class that holds the options; its docstrings are the help.
        function: runs the command and returns the exit code.
        prepare: makes arguments that the parser takes of those of the command line.
    """

    summary: str
    options: type
    function: Callable[[Any], int]
    prepare: Callable[[Sequence[str]], list[str]] = list

    def run(self, name: str, argv: Sequence[str]) -> int:
        """Parses the options and runs the command."""
        if issubclass(self.options, TrainCommand):  # published lines need a parser of their own
            return self.function(parse_train(argv, name))
        return self.function(
            tyro.cli(self.options, args=self.prepare(argv), prog=f"neuclip {name}")
        )


GROUPS: Mapping[str, str] = {"data": "Tools for data sets: build, download, inspect, pack, time."}

COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        "build the demo data, train, evaluate and report: minutes on two CPU cores", Demo, demo
    ),
    "train": Command("train a model; takes published command lines", TrainCommand, train),
    "finetune": Command(
        "train from given weights, with settings that fit them and the data", FinetuneCommand, train
    ),
    "eval": Command(
        "evaluate a checkpoint on evaluation splits or DataComp's tasks", Eval, evaluate
    ),
    "blend": Command(
        "mix the weights of two models, evaluate each mix, and write the best", Blend, blend
    ),
    "runs": Command(
        "list the runs of a folder: progress, best metric, state", RunsCommand, show_runs
    ),
    "report": Command("compare runs on one HTML page", Report, report, with_seconds),
    "export": Command("write a trained model for open_clip or Hugging Face", ExportCommand, export),
    "push": Command("upload an export to the Hugging Face hub", Push, push),
    "embed": Command("write the features of images and captions to a folder", Embed, embed),
    "classify": Command("choose a class for each image, zero-shot", Classify, classify),
    "score": Command("score each pair by its CLIP similarity, and filter", Score, score),
    "duplicates": Command(
        "find groups of images that are nearly the same", DuplicatesCommand, find_duplicates
    ),
    "search": Command("search images by text or by image on a local web page", Search, search),
    "methods": Command("list the training methods, or show one", Methods, show_methods),
    "data demo": Command("build the demo data", DataDemo, build_data),
    "data download-evalsets": Command("download DataComp's evaluation sets", Download, download),
    "data icons": Command("build pairs from open icon sets", Icons, build_icon_pairs),
    "data emoji": Command("build pairs from the emoji of vendors", EmojiPairs, build_emoji_pairs),
    "data inspect": Command(
        "show sizes, captions, corrupt samples and examples of a data set", Inspect, inspect_data
    ),
    "data pack": Command("write any data set as tar shards with a manifest", Pack, pack_data),
    "data bench": Command(
        "time reading, decoding, resizing and tokenizing to find the bottleneck", Bench, bench_data
    ),
}
