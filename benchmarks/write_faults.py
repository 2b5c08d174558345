"""Makes the n-th change of a file fail, for every n, in every command that writes.

    python benchmarks/write_faults.py                        # every n of every command: hours
    python benchmarks/write_faults.py --commands train resume --sample 10 --save

A small library (`faulty_disk.c`, built with gcc) is loaded before all others. It counts what a
command changes below a folder (files made, written, flushed, renamed or deleted; folders and links
made) and makes the n-th change fail, whichever library asks for it:

- `full` (ENOSPC): half of the write happens, and nothing fits from then on;
- `read-only` (EROFS): nothing can be changed from then on;
- `broken` (EIO): this change alone fails.

After each failure, one of these holds:

- the command has failed: exit code 2, one line of the cause, no traceback, and every file that was
  there is unchanged, or replaced by a whole one. The same command then runs undisturbed, and must
  end as if nothing had been, bit by bit;
- the change was not needed (a cache, the log, a removal): exit code 0, and the results are those
  of an undisturbed command.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from faulty_disk import (
    CAUSES,
    KINDS,
    Place,
    Snapshot,
    differences,
    files,
    preloaded,
    snapshot,
    whole,
)

MODEL = Path(__file__).parents[1] / "tests" / "data" / "model_configs" / "tiny-vit.json"
SECONDS = 300


# --- the commands -------------------------------------------------------------------------------

_RUN = "{given}/logs/run"
_TRAIN = (
    f"train --train-data {{given}}/data/train --model {MODEL}"
    " --val-data {given}/data/unseen_face_development"
    " --batch-size 16 --train-num-samples 64 --epochs 2 --warmup 2 --workers 0 --device cpu"
    " --log-every-n-steps 2 --save-every-steps 3 --logs {work}/logs --name run --resume auto"
)
_EVAL = (
    f"eval {_RUN} --workers 0 --device cpu --out {{work}}/results.jsonl --val-data {{given}}/data/"
)
_EXPORT = f"export {_RUN} --out {{work}}/out --format "
_REPORT = f"report {_RUN} --out {{work}}/report.html"


@dataclass(frozen=True)
class Command:
    """A command line, and the one that runs undisturbed before it."""

    line: str
    before: str = ""


COMMANDS = {
    "train": Command(_TRAIN),
    "resume": Command(_TRAIN, f"{_TRAIN} --stop-epochs 1"),
    "train without training": Command(
        f"train --resume {_RUN}/checkpoints/epoch_2.pt --epochs 0 --workers 0 --device cpu"
        " --val-data {given}/data/unseen_face_development --logs {work}/logs --name run"
    ),
    "eval": Command(f"{_EVAL}unseen_face_test", f"{_EVAL}unseen_character_test"),
    "export": Command(f"{_EXPORT}open_clip"),
    **{
        f"export {form}": Command(f"{_EXPORT}{form} --overwrite", f"{_EXPORT}{form}")
        for form in ("open_clip", "safetensors", "hf")
    },
    "report": Command(_REPORT, _REPORT),
    "data pack": Command(
        "data pack {given}/data/train --out {work}/packed --shard-samples 200 --workers 1"
    ),
    "data inspect": Command(
        "data inspect {given}/data/train --out {work}/page.html --max-samples 50"
    ),
    "data demo": Command("data demo --out {work}/demo"),
    "search": Command(
        f"search {_RUN} --images {{given}}/data/unseen_face_test --workers 0 --device cpu --port 0"
        " --embeddings {work}/features"
    ),
    "demo": Command("demo --smoke --method openclip --out {work}/demo"),
}


def words(place: Place, line: str) -> list[str]:
    """The words of a command line."""
    return line.format(given=place.given, work=place.work).split()


# --- one case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        output: what it printed.
        changes: number of changes that were counted.
        failed: whether one of them failed.
    """

    code: int
    output: str
    changes: int
    failed: bool


def run(place: Place, argv: list[str], at: int = 0, kind: str = "full") -> Outcome:
    """Runs a command line in a child process, and makes its change number `at` fail (0: none)."""
    place.allow(at, kind)
    child = os.fork()
    if child == 0:
        _work(place, argv)
    end, status = time.monotonic() + SECONDS, None
    while status is None:
        found, ended = os.waitpid(child, os.WNOHANG)
        status = ended if found else None
        if status is None and time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    output = place.output.read_text("utf-8", "replace")
    return Outcome(os.waitstatus_to_exitcode(status), output, *place.counted())


def _work(place: Place, argv: list[str]) -> None:
    """Runs in the child, and ends it."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(place.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        code = neuclip(argv)
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def neuclip(argv: list[str]) -> int:
    """Runs a command line in this process; a server stops at once."""
    from neuclip.cli.app import main
    from neuclip.search.local_server import LocalServer

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    LocalServer.serve_forever = stop
    return main(argv)


def fault(place: Place, command: Command, wanted: Snapshot, at: int, kind: str) -> str | None:
    """What is wrong after a change has failed; none if all is as it must be."""
    place.reset()
    before = furthest(place)
    found = run(place, words(place, command.line), at, kind)
    if not found.failed:
        return None
    wrong = _wrong_end(found) or _wrong_files(place, before)
    if not wrong and found.code == 0:
        wrong = differences(snapshot(place.work), wanted)
    if not wrong and found.code:
        again = run(place, words(place, command.line))
        wrong = differences(snapshot(place.work), wanted)
        if again.code != 0:
            wrong = f"exit code {again.code} {wrong}\n{again.output[-1500:]}"
        wrong = wrong and f"afterwards: {wrong}"
    return f"{wrong}\n{found.output[-2500:]}" if wrong else None


def _wrong_end(found: Outcome) -> str:
    lines = [line for line in found.output.splitlines() if any(c in line for c in CAUSES)]
    named = [line for line in lines if "/out.log: " not in line]  # the run goes on without it
    if "Traceback" in found.output:
        return "a traceback"
    if found.code not in (0, 2):
        return f"exit code {found.code}"
    if found.code and len(named) != 1:
        return f"{len(named)} lines of the cause"
    if found.code and found.output.splitlines()[-1] != named[0]:
        return "the cause is not the last line"
    return ""


def _wrong_files(place: Place, step: int) -> str:
    """Files that a failure has left broken or has lost."""
    names = {path.relative_to(place.work) for path in files(place.work)}
    broken = [str(name) for name in names if not whole(place.work / name)]
    gone = [
        str(name)
        for path in files(place.before)
        if (name := path.relative_to(place.before)) not in names and "iter_" not in name.name
    ]
    if broken or gone:
        return f"not whole: {broken}; gone: {gone}"
    return f"step {furthest(place)} after {step}" if furthest(place) < step else ""


def furthest(place: Place) -> int:
    """The step of the furthest whole checkpoint."""
    from neuclip.checkpoint import storage

    found = storage.furthest_complete(place.work / "logs" / "run" / "checkpoints")
    return storage.load(found)["neuclip"]["step"] if found else -1


# --- all cases ----------------------------------------------------------------------------------


def faults(
    place: Place, name: str, options: argparse.Namespace
) -> tuple[int, list[dict[str, object]]]:
    """The number of changes of an undisturbed command, and what was wrong after one had failed."""
    command = COMMANDS[name]
    place.restart()
    if command.before:
        done = run(place, words(place, command.before))
        assert done.code == 0, done.output
    place.keep()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        neuclip(words(place, command.line))  # its children import nothing
    place.reset()
    undisturbed = run(place, words(place, command.line))
    assert undisturbed.code == 0, undisturbed.output
    wanted, wrong = snapshot(place.work), list[dict[str, object]]()
    numbers = list(range(1, undisturbed.changes + 1))
    for kind in options.kinds:
        drawn = random.Random(f"{options.seed} {name} {kind}")
        size = min(len(numbers), options.sample or len(numbers))
        chosen = sorted(drawn.sample(numbers, size))
        for at in chosen:
            if problem := fault(place, command, wanted, at, kind):
                wrong.append({"kind": kind, "at": at, "wrong": problem})
                print(name, kind, at, problem, sep="\n  ", flush=True)
    return undisturbed.changes, wrong


def prepare(place: Place) -> None:
    """Makes the data, and a run that other commands read."""
    from neuclip.data.demo.build import tiny_demo

    tiny_demo(place.given / "data", characters=24)
    place.work.mkdir()
    done = run(place, words(place, _TRAIN))
    assert done.code == 0, done.output
    (place.work / "logs").rename(place.given / "logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sample", type=int, help="changes of each kind (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    options = parser.parse_args()
    place, start = preloaded(), time.monotonic()
    prepare(place)
    found = {}
    for name in options.commands:
        changes, wrong = faults(place, name, options)
        found[name] = {"changes": changes, "wrong": wrong}
        print(f"{name}: {changes} changes, {len(wrong)} wrong", flush=True)
    if options.save:
        import recorded
        import torch

        content = {"sample_of_each_kind": options.sample, "kinds": options.kinds}
        content |= {"seconds": round(time.monotonic() - start), "commands": found}
        recorded.save(recorded.RESULTS / "write_faults.json", 1, torch.device("cpu"), content)
    sys.exit(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    main()
