"""`neuclip duplicates`: groups of images that are nearly the same, by their features.

Imports torch only when it runs.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from neuclip.cli import terminal
from neuclip.cli.embedding_flags import Stored, StoredFlags
from neuclip.cli.options import check_range
from neuclip.errors import printable, quantity

if TYPE_CHECKING:
    from neuclip.embedding.near_duplicates import NearDuplicates

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class DuplicatesCommand(StoredFlags):
    """Find groups of images whose features are nearly the same.

    Two images are duplicates if their cosine similarity reaches --threshold; groups join images
    that are connected by duplicates. --out writes a table with the group of every image, in the
    form of a training table where the images are files: neuclip train --train-data FILE --label-key
    group treats duplicates as one label. --save-path writes one image of each group.
    """

    threshold: Annotated[float, arg(metavar="FLOAT")] = 0.95
    """cosine similarity from which on two images are duplicates"""


def find_duplicates(command: DuplicatesCommand) -> int:
    """Compares all images, prints the groups, and writes them.

    Raises:
        UserError: model or data cannot be read, or a file cannot be written.
    """
    check_range("threshold", command.threshold, gt=0, le=1)
    command.check()
    from neuclip.embedding.kept_samples import write_kept
    from neuclip.embedding.near_duplicates import near_duplicates
    from neuclip.files import write_whole
    from neuclip.model.device import choose_device
    from neuclip.parallel import collectives

    with command.stored(texts=False) as stored:
        if not collectives.is_main():
            return 0
        with terminal.progress() as progress:
            device = choose_device(command.device)
            found = near_duplicates(stored.store, command.threshold, device, progress)
        _print(found, command.threshold)
        if command.out is not None:
            write_whole(command.out, _table(found, stored))
            print(f"groups written to {command.out}")
        if command.save_path is not None:
            names = stored.names(found.positions.tolist(), found.keys, command.uid_key)
            rows = found.first_of_groups().nonzero()[0].tolist()
            write_kept(command.save_path, [names[row] for row in rows], names)
            print(f"kept {len(rows):,} of {quantity(len(names), 'image')}: {command.save_path}")
    return 0


def _print(found: "NearDuplicates", threshold: float) -> None:
    from neuclip.embedding.near_duplicates import EXACT

    members: dict[int, list[int]] = {}
    for row in found.several.nonzero()[0].tolist():
        members.setdefault(int(found.groups[row]), []).append(row)
    largest = sorted(members.values(), key=len, reverse=True)
    exact = int((found.similarity >= EXACT).sum())
    facts = [
        ("images", f"{len(found.keys):,}"),
        ("groups", f"{len(members):,} of images with a similarity of at least {threshold:g}"),
        ("images in groups", f"{sum(map(len, members.values())):,}"),
        ("exact duplicates", f"of {quantity(exact, 'image')} (similarity of at least {EXACT:g})"),
    ]
    terminal.print_facts(facts)
    for group in largest[:_SHOWN]:
        keys = ", ".join(printable(found.keys[row], 40) for row in group[:_SHOWN])
        print(f"  {quantity(len(group), 'image')}: {keys}{', ...' * (len(group) > _SHOWN)}")


def _table(found: "NearDuplicates", stored: Stored) -> str:
    """A row per image; the first two columns are those of a training table, if images are files."""
    from neuclip.data.decode import image_endings

    places = [] if stored.source is None else map(stored.source.file_of, found.positions.tolist())
    files = [Path(place).resolve() for place in places]
    are_images = all(file.suffix[1:].lower() in image_endings() for file in files)
    head = ["title", "key", "position", "group", "similarity"]
    columns = [found.captions, found.keys, found.positions.tolist(), found.groups.tolist(),
               found.similarity.round(4).tolist()]  # fmt: skip
    if files and are_images:
        head, columns = ["filepath", *head], [files, *columns]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(head)
    table.writerows(zip(*columns, strict=True))
    return file.getvalue()
