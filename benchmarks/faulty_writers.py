"""Makes every change of every writer of the package fail in turn, each in three ways.

    python benchmarks/faulty_writers.py --save

A writer ends in one line (`UserError`) or has done its work; what was whole stays whole; and the
same call afterwards ends as if nothing had been. See `faulty_disk.py` and `write_faults.py`.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from faulty_disk import CAUSES, KINDS, Place, differences, files, preloaded, snapshot, whole

Writer = Callable[[Path], None]
"""Writes into a folder; called twice before the first fault, so that older files are there."""


def text(folder: Path) -> None:
    from neuclip.files import write_whole

    write_whole(folder / "deep" / "settings.json", "{}" + " " * 100_000)


def records(folder: Path) -> None:
    from neuclip.training.records.sinks import JsonLines

    lines = JsonLines(folder / "metrics.jsonl", 0)
    lines({"kind": "train", "step": 1})
    lines({"kind": "train", "step": 2})
    lines.close()


def results(folder: Path) -> None:
    import torch

    from neuclip.evaluation.outcomes import outcomes_of, write_outcomes
    from neuclip.evaluation.results import write_eval_result

    for key in ("one", "other"):
        write_eval_result(folder / "results.jsonl", key, {"acc1": 0.5})
    write_outcomes(folder / "outcomes" / "one.npz", outcomes_of("mean", torch.ones(5000)))


def checkpoints(folder: Path) -> None:
    import torch

    from neuclip.checkpoint.saver import Saver

    saver = Saver(sharded=False, keep_step_checkpoints=2)
    with saver.open():
        for step in (1, 2):
            content = {"state_dict": {"w": torch.full((9000,), step)}, "neuclip": {"step": step}}
            saver.save(folder / "checkpoints" / f"iter_{step}.pt", content)


def lock(folder: Path) -> None:
    from neuclip.parallel.folder_lock import FolderLock

    with FolderLock() as held:
        held.acquire(folder)
        held.check()


def shards(folder: Path) -> None:
    from neuclip.data.shard_writer import write_shards
    from neuclip.files import folder_when_complete, writing

    samples = ((f"{n:03}", {"txt": b"a" * 4000}) for n in range(8))
    with writing(folder / "data"), folder_when_complete(folder / "data") as new:
        write_shards(new / "train", samples, 4)


def packed(folder: Path) -> None:
    from neuclip.data.tools.pack import Plan, pack

    pack(_source(), Plan("source", 8, 4), folder / "packed", workers=1)


@cache
def _source() -> object:
    import io

    from PIL import Image

    from neuclip.config.data_sections import ReadingConfig
    from neuclip.data.opening import open_source
    from neuclip.data.shard_writer import write_shards

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "png")
    folder = _place().given / "source"
    samples = ((f"{n:03}", {"png": buffer.getvalue(), "txt": b"a"}) for n in range(8))
    write_shards(folder, samples, 8)
    return open_source(str(folder), ReadingConfig())


def weights(folder: Path) -> None:
    """By a library in Rust, which raises an error of its own."""
    import torch
    from safetensors.torch import save_file

    from neuclip.files import folder_when_complete, writing

    with writing(folder / "model"), folder_when_complete(folder / "model") as new:
        save_file({"w": torch.ones(50_000)}, new / "w.safetensors")


WRITERS: dict[str, Writer] = {
    writer.__name__: writer
    for writer in (text, records, results, checkpoints, lock, shards, packed, weights)
}


@cache
def _place() -> Place:
    return preloaded()


def faults(name: str, kinds: list[str]) -> tuple[int, list[str]]:
    """The number of faults of a writer, and what was wrong after some."""
    place, wrong, count = _place(), list[str](), 0
    place.restart()
    _source()
    WRITERS[name](place.work)
    if name == "packed":  # a second call does nothing
        wanted = snapshot(place.work)
        place.restart()
    else:
        WRITERS[name](place.work)
        wanted = snapshot(place.work)
    place.keep()
    for kind in kinds:
        for at in itertools.count(1):
            place.reset()
            problem = _one(place, WRITERS[name], kind, at, wanted)
            if problem is None:
                break
            count += 1
            wrong += [f"{name}, {kind} at change {at}: {problem}"] if problem else []
    return count, wrong


def _one(place: Place, writer: Writer, kind: str, at: int, wanted: dict[str, bytes]) -> str | None:
    """What is wrong after a change has failed; none: there are fewer changes."""
    from neuclip.errors import UserError

    said, error = "", None
    place.allow(at, kind)
    try:
        writer(place.work)
    except UserError as caught:
        said = str(caught)
    except BaseException as caught:
        error = caught
    _, failed = place.counted()
    place.allow()
    if not failed:
        return None
    if error is not None:
        return f"{type(error).__name__}: {error}"
    if said and ("\n" in said or not any(cause in said for cause in CAUSES)):
        return said
    broken = [path.name for path in files(place.work) if not whole(path)]
    aside = {path.name for path in place.work.glob(".*/old/**/*")}  # for the next call
    gone = snapshot(place.before).keys() - snapshot(place.work).keys()
    gone = {name for name in gone if kind != "read-only" or Path(name).name not in aside}
    if broken or {name for name in gone if "iter_" not in name}:
        return f"not whole: {broken}; gone: {sorted(gone)} ({said})"
    if not said and (found := differences(snapshot(place.work), wanted)):
        return f"without a word: {found}"
    try:
        writer(place.work)
    except BaseException as caught:
        return f"afterwards: {type(caught).__name__}: {caught} (before: {said})"
    found = differences(snapshot(place.work), wanted)
    return f"afterwards: {found} (before: {said})" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    options = parser.parse_args()
    place, start = _place(), time.monotonic()
    place.given.mkdir()
    logging.getLogger("neuclip").setLevel(logging.ERROR)
    counts, wrong = dict[str, int](), list[str]()
    for name in options.writers:
        counts[name], found = faults(name, options.kinds)
        wrong += found
        print(f"{name}: {counts[name]} faults, {len(found)} wrong", *found, sep="\n  ", flush=True)
    if options.save:
        import recorded
        import torch

        seconds = round(time.monotonic() - start)
        content = {"faults": counts, "kinds": options.kinds, "seconds": seconds, "wrong": wrong}
        recorded.save(recorded.RESULTS / "faulty_writers.json", 1, torch.device("cpu"), content)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
