"""Command lines of `neuclip train` in tests: parsing them, and the published ones."""

import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from neuclip.cli.train import TrainCommand, parse_train
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Published:
    """A published line, and what `neuclip train` does with it."""

    title: str
    outcome: str
    line: str


def published_lines() -> dict[str, Published]:
    blocks = (DATA / "published_commands.txt").read_text().strip().split("\n\n")[1:]
    found = [Published(*block.split("\n")) for block in blocks]
    return {
        one.title.removeprefix("# "): Published(
            one.title.removeprefix("# "), one.outcome.removeprefix("outcome: "), one.line
        )
        for one in found
    }


def command(line: str) -> TrainCommand:
    """A line as it is parsed."""
    return parse_train(shlex.split(line)) if "--config" in line else _once(line)


@cache
def _once(line: str) -> TrainCommand:
    """Parsing takes a tenth of a second; a line without files has one meaning."""
    return parse_train(shlex.split(line))


def parse(line: str) -> RunConfig:
    """The settings of a line as asked for; their rules are checked too."""
    config = command(line).config
    resolve(config, 1)
    return config


def resolved(line: str) -> RunConfig:
    return resolve(parse(line), 1)


def notes(line: str) -> tuple[str, ...]:
    return command(line).notes


def refusal(line: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)
