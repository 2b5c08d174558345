"""`neuclip classify`: chooses a class for each image of a data set.

Imports torch only when it runs.
"""

import contextlib
import csv
import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.embedding_flags import EmbeddingFlags, check_outputs, data_files
from neuclip.cli.options import check_range
from neuclip.errors import UserError, printable, quantity

if TYPE_CHECKING:
    from neuclip.embedding.trained_model import Classification

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Classify(EmbeddingFlags):
    """Choose a class for each image by zero-shot classification, as neuclip eval does.

    The table has a row per image: its key, and the most probable classes with their probabilities.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """images in the form of --train-data: shards, tables, folders; :: joins several"""
    run: Annotated[Path, arg(metavar="RUN", aliases=("--checkpoint",), help_behavior_hint="")]
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    classes: Annotated[Path, arg(metavar="FILE", help_behavior_hint="")]
    """text file with the name of a class a line"""
    out: Annotated[Path, arg(metavar="FILE.csv", help_behavior_hint="")]
    """table to write"""
    templates: Annotated[
        str, arg(metavar="FILE", help_behavior_hint="(default: a photo of a {c}.)")
    ] = "a photo of a {c}."
    """prompts for the names: a text file with one a line, or the prompts separated by ::"""
    top: int = 1
    """classes per image"""


def classify(command: Classify) -> int:
    """Classifies, writes the table, and prints how often each class was chosen.

    Raises:
        UserError: classes, model or data cannot be used, or the table cannot be written.
    """
    command.check()
    check_range("top", command.top, ge=1)
    import torch

    from neuclip.embedding.trained_model import TrainedModel, checked_names
    from neuclip.evaluation.class_names import prompts_of, text_lines
    from neuclip.evaluation.embed import encode_images, start_reading
    from neuclip.files import check_writable, write_whole
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group

    if not command.classes.is_file():
        raise UserError(f"--classes {command.classes}: no such file")
    names = checked_names(text_lines(command.classes), f"--classes {command.classes}")
    templates = prompts_of(command.templates, "--templates")
    inputs = [
        *data_files(command.source),
        ("--classes", command.classes),
        ("--templates", Path(command.templates)),
        ("--run", command.run),
    ]
    check_outputs([("--out", command.out)], inputs)
    check_writable(command.out, "--out")
    # The ranks only share work, for which gloo serves any device.
    with (
        open_process_group(torch.device("cpu")) as launch,
        contextlib.closing(command.open(command.source, captions="optional")) as source,
        terminal.progress() as progress,
    ):
        loaded = command.load(command.run, launch.local_rank)
        model = TrainedModel(loaded, command.batch_size, command.workers)
        settings = command.settings()
        if collectives.is_main():
            settings = replace(settings, progress=progress)
        batches = start_reading(loaded.encoder, source, settings, title="classifying")
        images = encode_images(loaded.encoder, batches, allow_damage=True)
        found = model.classify(images.image_features, names, templates)
    if collectives.is_main():
        write_whole(command.out, _table(images.keys, found, command.top))
        _print(found)
        damage = [*source.damage, *images.damage]
        if damage:
            terminal.say(f"{quantity(len(damage), 'corrupt sample')} left out")
            for each in damage[:5]:
                terminal.say(f"  {each}")
        repeated = len(images.keys) - len(set(images.keys))
        if repeated:
            terminal.say(
                f"{quantity(repeated, 'image')} of other shards, tables or folders repeat a key: "
                "the rows of the table are in the order of the data"
            )
        print(f"written to {command.out}")
    return 0


def _table(keys: list[str], found: "Classification", top: int) -> str:
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    number = min(top, len(found.class_names))
    ends = ["", *(f"_{rank}" for rank in range(2, number + 1))]
    table.writerow(["key", *(name + end for end in ends for name in ("class", "probability"))])
    for key, best in zip(keys, found.top(number), strict=True):
        chosen = [cell for name, value in best or [] for cell in (name, f"{value:.6g}")]
        table.writerow([key, *chosen])
    return file.getvalue()


def _print(found: "Classification") -> None:
    """Prints how often each class was chosen, the most frequent first."""
    chosen = Counter(label for label in found.labels if label is not None)
    rows = chosen.most_common(_SHOWN)
    for name, count in rows:
        print(f"{count:>10,}  {count / chosen.total():6.1%}  {printable(name, 60)}")
    if len(chosen) > len(rows):
        print(f"{'':>10}  and {quantity(len(chosen) - len(rows), 'more class')}")
