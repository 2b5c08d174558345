"""Compares the cost of reading, indexing and checkpointing with an earlier revision's.

    python benchmarks/against_revision.py 38c3234 --rounds 15

One process imports the present sources, another one those of the revision, taken from git. They do
the same work on the same files in turns, a short piece each, so that the ratio of two neighbouring
pieces holds while the machine's speed drifts. CPU seconds are compared, since other programs share
the machine. Writes `against_revision.json` into benchmarks/results/.
"""

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = 2000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="the earlier revision, in any form that git knows")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of measurements of each part")
    parser.add_argument("--parts", default="", help="names of parts joined by commas; none: all")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--work":
        work(Path(sys.argv[2]))
        return
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        old = old_source(args.revision, folder)
        before, after = Worker("before", old, folder), Worker("after", ROOT, folder)
        parts = [part for part in args.parts.split(",") if part] or after.parts
        found = {}
        for part in parts:
            for worker in (before, after):
                worker.run(part)  # warm-up: imports, page cache
            # Each neighbour of a pair comes first in half of the rounds.
            pairs = []
            for number in range(args.rounds):
                first, second = (before, after) if number % 2 == 0 else (after, before)
                one, two = first.run(part), second.run(part)
                pairs.append((one, two) if first is before else (two, one))
            ratios = sorted(after_s / before_s for before_s, after_s in pairs)
            found[part] = {
                "before_cpu_s": round(statistics.median(pair[0] for pair in pairs), 4),
                "after_cpu_s": round(statistics.median(pair[1] for pair in pairs), 4),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_quartiles": [
                    round(ratios[len(ratios) // 4], 3),
                    round(ratios[-1 - len(ratios) // 4], 3),
                ],
            }
            print(f"{part:32} {json.dumps(found[part])}", flush=True)
    if not args.no_save:
        import torch
        from recorded import RESULTS, save

        content = {"revision": args.revision, "pairs": PAIRS, "rounds": args.rounds, "parts": found}
        save(RESULTS / "against_revision.json", 1, torch.device("cpu"), content)


def old_source(revision: str, folder: Path) -> Path:
    """The sources of a revision, in a folder of their own."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "src"], check=True, capture_output=True
    ).stdout
    place = folder / "before"
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(place, filter="data")
    return place


class Worker:
    """A process that measures the parts with the sources of one revision."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        own = folder / f"of-{name}"  # each keeps its indexes in its own copy of the data
        shutil.copytree(folder / "data", own / "data", copy_function=os.link)
        environment = os.environ | {
            "PYTHONPATH": str(root / "src"),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(own / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        hello = self._answer()
        assert Path(hello["package"]).is_relative_to(root), hello
        self.parts: list[str] = hello["parts"]

    def run(self, part: str) -> float:
        """CPU seconds of one piece of work."""
        self._process.stdin.write(part + "\n")
        self._process.stdin.flush()
        return self._answer()["cpu"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a measuring process ended; its message stands above")
        return json.loads(line)


def work(folder: Path) -> None:
    """Runs in the measuring process: does the parts that standard input names."""
    import neuclip

    parts = make_parts(folder / "data", folder / "scratch")
    print(json.dumps({"package": neuclip.__file__, "parts": list(parts)}), flush=True)
    for line in sys.stdin:
        part = parts[line.strip()]
        before = time.process_time()
        part()
        print(json.dumps({"cpu": time.process_time() - before}), flush=True)


def make_parts(data: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """The pieces of work, by name; they use only what all revisions compared have."""
    import torch

    from neuclip.checkpoint import storage
    from neuclip.config.data_sections import ReadingConfig
    from neuclip.data.decode import ImageDecoder
    from neuclip.data.opening import open_source
    from neuclip.data.sources.source import Source

    torch.set_num_threads(1)
    (scratch / "checkpoints").mkdir(parents=True)
    reading, decode = ReadingConfig(), ImageDecoder(smallest=64)
    sources: dict[str, Source] = {}

    def read(name: str) -> None:
        if name not in sources:
            sources[name] = open_source(str(data / name), reading)
        for position in range(0, PAIRS, 4):
            sources[name].read_with(position, decode)

    def open_new(name: str) -> None:
        for _ in range(3):
            shutil.rmtree(data / name / ".neuclip", ignore_errors=True)  # indexes of shards
            open_source(str(data / name), reading)

    # 60 MB, as AdamW's state of a small model; more would measure the disk.
    content = {
        "model": {f"layer{number}": torch.randn(512, 512) for number in range(20)},
        "optimizer": {f"moment{number}": torch.randn(512, 512) for number in range(40)},
        "step": 1,
    }
    path = scratch / "checkpoints" / "iter_1.pt"

    def save() -> None:
        path.unlink(missing_ok=True)
        storage.save(path, content)

    def verify() -> None:
        storage.verify(path)

    return {
        "index shards": lambda: open_new("shards"),
        "open csv": lambda: open_new("pairs.csv"),
        "open folder": lambda: open_new("folder"),
        "open indexed shards": lambda: [open_source(str(data / "shards")) for _ in range(5)],
        "read shards": lambda: read("shards"),
        "read csv": lambda: read("pairs.csv"),
        "read folder": lambda: read("folder"),
        "save checkpoint": save,
        "verify checkpoint": verify,
    }


def write_data(folder: Path) -> None:
    """The same pairs as shards, as a table of files, and as a folder with captions beside."""
    from photographs import make_shards

    (folder / "folder").mkdir(parents=True)
    make_shards(folder / "shards", PAIRS, 256)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["filepath", "title"])
        for shard in sorted((folder / "shards").glob("*.tar")):
            with tarfile.open(shard) as opened:
                for member in opened:
                    if Path(member.name).suffix not in {".jpg", ".txt"}:
                        continue
                    content = opened.extractfile(member).read()
                    path = folder / "folder" / Path(member.name).name
                    path.write_bytes(content)
                    if path.suffix == ".txt":
                        rows.writerow([path.with_suffix(".jpg"), content.decode()])


if __name__ == "__main__":
    main()
