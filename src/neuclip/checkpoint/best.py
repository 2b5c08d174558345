"""Keeps the best checkpoint of a run under a name of its own, whatever happens to its first one."""

import contextlib
import os
import shutil
from pathlib import Path

from neuclip.checkpoint import sharded
from neuclip.checkpoint.common import not_written, read_sums, remove
from neuclip.checkpoint.storage import append_sum, write_sums
from neuclip.files import partial_name, replacing, sha256, synchronize
from neuclip.run_folder import BEST


def keep_as_best(path: Path, folder: Path) -> Path:
    """Makes `epoch_best.pt` the same file as a checkpoint, by a hard link or else a copy.

    A sharded checkpoint becomes the folder `epoch_best`, with links to all its files. An older best
    checkpoint is replaced once the new one is complete.

    Args:
        path: the checkpoint: a file, or a folder if it is sharded.
        folder: the checkpoints of the run.

    Returns:
        The best checkpoint.

    Raises:
        CheckpointError: disk full or permission denied.
    """
    best = folder / (Path(BEST).stem if sharded.is_sharded(path) else BEST)
    try:
        if best.exists() and best.samefile(path):
            return best
        if sharded.is_sharded(path):
            _link_folder(path.resolve(), best)
        else:
            _link_file(path, best)
        remove(best.with_suffix("" if best.suffix else ".pt"))
    except OSError as error:
        raise not_written(best, error) from None
    return best


def _link_file(path: Path, best: Path) -> None:
    # A line of SHA256SUMS is written before its file appears, so every complete file has one.
    before = [line for line in read_sums(best.parent) or () if line[1] != best.name]
    written = [digest for digest, name in read_sums(path.parent) or () if name == path.name]
    digest = written[-1] if written else sha256(path)
    append_sum(best, digest)
    link = partial_name(best)
    try:
        os.link(path, link)
        link.replace(best)
    except OSError:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        with path.open("rb") as source, replacing(best) as copy:
            shutil.copyfileobj(source, copy)
    write_sums(best.parent, [*before, (digest, best.name)])


def _link_folder(path: Path, best: Path) -> None:
    partial = partial_name(best)
    partial.mkdir()
    for file in sorted(path.iterdir()):
        try:
            os.link(file, partial / file.name)
        except OSError:
            shutil.copyfile(file, partial / file.name)
    synchronize(partial)
    remove(best)
    partial.replace(best)
    synchronize(best.parent)
