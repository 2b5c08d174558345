"""Reads damaged files of every kind, each in a process of its own with limits on memory and time.

    python benchmarks/fuzz_readers.py --cases 500

The seeds are fixed. A case damages a small valid file, opens it as `--train-data` would
and reads all its samples. It may end as

- `answer`: all samples are read,
- `damage`: corrupt samples are reported and the others read,
- `refusal`: the data are not opened, and one message says why.

Anything else is a fault: `traceback`, `hang` (more than 20 s) or `dead` (the process crashed). The
process cannot take more than 512 MB above its start. Writes `fuzz_readers.json` into
benchmarks/results/, with the seed of every fault.
"""

import argparse
import faulthandler
import gzip
import io
import json
import os
import random
import resource
import select
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from neuclip.config.sections import ReadingConfig
from neuclip.data.opening import open_source
from neuclip.data.samples import SampleError
from neuclip.errors import UserError

GOOD = ("answer", "damage", "refusal")
SECONDS, MEMORY = 20, 512 * 2**20
_READ = 60  # samples of a case

Case = Callable[[Path, random.Random], tuple[str, ReadingConfig]]
"""Writes files into a folder; returns the pattern that names them and how to read them."""


# --- valid files ---------------------------------------------------------------------------------


def picture(kind: str = "jpeg", side: int = 24, **options: object) -> bytes:
    """A small image file."""
    pixels = np.arange(side * side * 3, dtype=np.uint32).reshape(side, side, 3) * 7919 % 251
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.astype(np.uint8))
    (image.convert("P") if kind == "gif" else image).save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """An image file of each kind, by ending."""
    return {
        "jpg": picture("jpeg"),
        "progressive.jpg": picture("jpeg", progressive=True),
        "png": picture("png"),
        "webp": picture("webp"),
        "gif": picture("gif"),
        "bmp": picture("bmp"),
        "tif": picture("tiff", compression="tiff_lzw"),
        "ppm": picture("ppm"),
        "jp2": picture("jpeg2000"),
    }


def shard(samples: int = 6, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar shard with images, captions, JSON and classes; one key is long."""
    buffer, image = io.BytesIO(), picture("png", 6)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(samples):
            key = "k" * 120 if number == 2 and form != tarfile.USTAR_FORMAT else f"{number:05d}"
            facts = json.dumps({"caption": f"number {number}", "sizes": [number, {"w": 1.5}]})
            for ending, content in (
                ("png", image),
                ("txt", f"number {number}".encode()),
                ("json", facts.encode()),
                ("cls", str(number).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def arrow_table(rows: int = 40):
    import pyarrow

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    content = picture("png", 6)
    images = [{"bytes": content, "path": f"{number}.png"} for number in range(rows)]
    texts = [f"number {number}" for number in range(rows)]
    return pyarrow.table({"image": pyarrow.array(images, image), "text": texts})


# --- random damage -------------------------------------------------------------------------------

_NUMBERS = (b"0", b"-1", b"999999999999999999999", b"1" * 5000, b"1e400", b"NaN", b"4294967296")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content after one to four random changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((1, 4, 40, 600)))
        change = rng.randrange(7)
        if change == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place:end] = rng.randbytes(end - place)
        elif change == 2:
            del data[place:end]
        elif change == 3:
            data[place:place] = data[place:end] * rng.choice((1, 2, 50))
        elif change == 4:
            data[place:end] = rng.choice((b"\0", b"\xff")) * (end - place)
        elif change == 5:
            data[place:place] = rng.choice(_NUMBERS)
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def fixed_sums(content: bytes) -> bytes:
    """A tar file whose headers have correct sums, so that damage passes the first check."""
    data = bytearray(content)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def _tar(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    content = damaged(shard(form=form), rng)
    (folder / "0.tar").write_bytes(fixed_sums(content) if rng.random() < 0.7 else content)
    return str(folder / "0.tar"), ReadingConfig(caption_key=rng.choice((None, "caption")))


def _index(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    path = folder / "0.tar"
    path.write_bytes(shard())
    open_source(str(path))
    index = folder / ".neuclip" / "0.tar.index.npz"
    index.write_bytes(damaged(index.read_bytes(), rng))
    return str(path), ReadingConfig()


def _image(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    for number, (ending, content) in enumerate(pictures().items()):
        name = f"{number}.{ending.rpartition('.')[2]}"
        (folder / name).write_bytes(damaged(content, rng))
        (folder / f"{number}.txt").write_bytes(b"a caption")
    return str(folder), ReadingConfig()


def _json(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    facts = b'{"caption": ["one", "two"], "more": [[1, 2.5], {"a": 0}], "url": "\\ud83d\\ude00"}'
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture("png", 6))
        (folder / f"{number}.json").write_bytes(damaged(facts, rng))
    return str(folder), ReadingConfig(caption_key="caption;url")


def _json_lines(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    (folder / "a.png").write_bytes(picture("png", 6))
    lines = [b'{"image": "a.png", "caption": "one", "tags": [1, [2]]}'] * 5
    content = b"\n".join(lines) if rng.random() < 0.7 else b"[" + b",".join(lines) + b"]"
    (folder / "t.jsonl").write_bytes(damaged(content, rng))
    return str(folder / "t.jsonl"), ReadingConfig()


def _csv(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    (folder / "a.png").write_bytes(picture("png", 6))
    content = b"filepath,title\n" + 'a.png,"one, ""two"""\na.png,é\n'.encode() * 4
    content = damaged(content, rng)
    packed = rng.random() < 0.3
    (folder / "t.csv").write_bytes(damaged(gzip.compress(content), rng) if packed else content)
    return str(folder / "t.csv"), ReadingConfig()


def _parquet(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(arrow_table(), buffer, row_group_size=10)
    (folder / "t.parquet").write_bytes(damaged(buffer.getvalue(), rng))
    return str(folder / "t.parquet"), ReadingConfig()


def _arrow(folder: Path, rng: random.Random) -> tuple[str, ReadingConfig]:
    import pyarrow

    buffer, table = io.BytesIO(), arrow_table()
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    state = b'{"_data_files": [{"filename": "d.arrow"}]}'
    broken = rng.random() < 0.8
    content = buffer.getvalue()
    (folder / "d.arrow").write_bytes(damaged(content, rng) if broken else content)
    (folder / "state.json").write_bytes(state if broken else damaged(state, rng))
    (folder / "dataset_info.json").write_bytes(b"{}")
    return str(folder), ReadingConfig()


KINDS: dict[str, Case] = {
    "tar": _tar,
    "index": _index,
    "image": _image,
    "json": _json,
    "jsonl": _json_lines,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}


# --- one case ------------------------------------------------------------------------------------


def read(pattern: str, reading: ReadingConfig) -> str:
    """Opens a source and reads its first samples, as training would."""
    try:
        source = open_source(pattern, reading)
    except UserError:
        return "refusal"
    damage = len(source.damage)
    for position in range(min(len(source), _READ)):
        try:
            source.read(position)
        except SampleError:
            damage += 1
    return "damage" if damage else "answer"


def outcome(case: Case, seed: int | str) -> tuple[str, str]:
    """How a case ends, and the end of its traceback; read in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        return _in_child(lambda: read(*case(Path(folder), random.Random(f"{seed}"))))


def _in_child(work: Callable[[], str]) -> tuple[str, str]:
    """What some work returns, or how it fails, in a process with limits on memory and time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, writer)
    os.close(writer)
    try:
        ready = select.select([reader], [], [], SECONDS)[0]
        text = b"".join(iter(lambda: os.read(reader, 65536), b"")).decode() if ready else "hang\n"
    finally:
        os.close(reader)
        if not ready:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not text:
        return "dead", f"status {status}"
    name, _, detail = text.partition("\n")
    return name, detail


def _work(work: Callable[[], str], writer: int) -> None:
    """Runs in the child, and ends it."""
    try:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        os.environ["XDG_CACHE_HOME"] = "/nonexistent"
        text = f"{work()}\n"
    except BaseException as error:
        last = traceback.format_exception(error)[-3:]
        text = "traceback\n" + "".join(last)[-1500:]
    os.write(writer, text.encode("utf-8", "replace"))
    os._exit(0)


def _address_space() -> int:
    """Bytes of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz(cases: int, first: int = 0) -> tuple[dict[str, Counter[str]], list[dict[str, str]]]:
    """Runs cases of all kinds in turn.

    Returns:
        Number of cases by kind and outcome, and the faults.
    """
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults: list[dict[str, str]] = []
    for number in range(first, first + cases):
        kind = list(KINDS)[number % len(KINDS)]
        found, detail = outcome(KINDS[kind], number)
        counts[kind][found] += 1
        if found not in GOOD:
            faults.append({"kind": kind, "seed": str(number), "outcome": found, "detail": detail})
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args()
    import recorded
    import torch

    start = time.monotonic()
    counts, faults = fuzz(options.cases, options.first)
    seconds = round(time.monotonic() - start)
    for kind, found in counts.items():
        print(f"{kind:10}", dict(found))
    for fault in faults:
        print(fault["kind"], fault["seed"], fault["outcome"], fault["detail"], sep="\n  ")
    content = {"cases": options.cases, "seconds": seconds, "outcomes": counts, "faults": faults}
    recorded.save(recorded.RESULTS / "fuzz_readers.json", 1, torch.device("cpu"), content)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
