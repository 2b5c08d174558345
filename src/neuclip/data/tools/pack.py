"""Any source to tar shards: in parallel, to be taken up again after a kill, with a manifest.

`<out>/` then holds `00000.tar`, `00001.tar`, ..., `manifest.json` with the size and checksum of
each, and `pack_report.json` with what was left out. While it is filled, `.pack/` in it tells what
is done: a shard takes its name when it is complete, its record follows, and a second start makes
what has no record. The same source gives the same bytes, whatever the number of processes.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import BinaryIO, cast

from neuclip.data.damage import DamageLog
from neuclip.data.decode import ImageDecoder
from neuclip.data.remote.manifest import MANIFEST, ShardEntry, manifest_text, parse_manifest
from neuclip.data.samples import Damage, DamageKind, SampleError, Unusable
from neuclip.data.sources.source import Content, Source, sample_error
from neuclip.errors import UserError
from neuclip.files import replacing

REPORT = "pack_report.json"

_STATE = ".pack"
_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"
}  # fmt: skip

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a pack makes of a source; a second start must ask for the same.

    Attributes:
        source: what the user calls it.
        samples: how many it has.
        shard_samples: samples read for every shard but the last.
    """

    source: str
    samples: int
    shard_samples: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_samples)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{shard:05d}.tar"

    def positions(self, shard: int) -> range:
        """The samples that go into a shard."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.samples))


@dataclass(frozen=True)
class Packed:
    """What a pack made.

    Attributes:
        shards: the manifest's entries.
        reused: shards that an earlier start had made.
        log: what was left out.
    """

    shards: list[ShardEntry]
    reused: int
    log: DamageLog


def pack(
    source: Source, plan: Plan, out: Path, *, workers: int = 1, progress: Progress | None = None
) -> Packed:
    """Write a source as tar shards, or what is still missing of them.

    Keys are positions in the source, so they can serve as sample ids (`--data-size`); the `.json`
    of a sample tells its name there. Image files are copied as they are. A damaged sample is left
    out and reported.

    Args:
        source: what is read.
        plan: how it is divided.
        out: folder to fill.
        workers: processes that write, each a shard of its own.
        progress: called with what is being done, and how many shards are done and all.

    Raises:
        UserError: the folder holds something else, is being filled, or cannot be written.
    """
    try:
        complete = _complete(plan, out)
        if complete is not None:
            return complete
        with _owned(out, plan):
            return _pack(source, plan, out, workers, progress)
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"cannot write {where}: {error.strerror or error}; the shards that are done are kept: "
            "the same command continues"
        ) from None
    except BrokenProcessPool:
        raise UserError(
            "a process that writes shards was killed (out of memory?); the same command "
            "continues, perhaps with fewer --workers"
        ) from None


def _pack(source: Source, plan: Plan, out: Path, workers: int, progress: Progress | None) -> Packed:
    records = {number: _record(plan, out, number) for number in range(plan.shards)}
    missing = [number for number, record in records.items() if record is None]
    reused = plan.shards - len(missing)
    for done, record in enumerate(_written(source, plan, out, missing, workers)):
        records[record.number] = record
        if progress is not None:
            progress("packing", reused + done + 1, plan.shards)
    log, entries = DamageLog(), list[ShardEntry]()
    log.add(source.damage)
    for record in records.values():
        assert record is not None
        entries.append(record.entry)
        log.add(record.damage)
    report = {**asdict(plan), "damage": log.report()}
    _write_whole(out / REPORT, json.dumps(report, indent=2))
    _write_whole(out / MANIFEST, manifest_text(entries))
    return Packed(entries, reused, log)


# one shard --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A shard that is complete."""

    number: int
    entry: ShardEntry
    damage: list[Damage]


def _record(plan: Plan, out: Path, number: int) -> _Record | None:
    """The record of a shard, if it is there and the shard is as it says."""
    try:
        text = (out / _STATE / f"{plan.name(number)}.json").read_text(encoding="utf-8")
        stored = json.loads(text)
        entry = ShardEntry(**stored["entry"])
        damage = [
            Damage(each["shard"], each["key"], cast(DamageKind, each["kind"]), each["detail"])
            for each in stored["damage"]
        ]
        whole = (out / entry.name).stat().st_size == entry.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Record(number, entry, damage) if whole else None


def _written(
    source: Source, plan: Plan, out: Path, numbers: list[int], workers: int
) -> Generator[_Record]:
    """Write shards, and yield their records as they are done."""
    if workers <= 1 or len(numbers) <= 1:
        for number in numbers:
            yield _write_shard(source, plan, out, number)
        return
    with ProcessPoolExecutor(
        min(workers, len(numbers)),
        mp_context=get_context("spawn"),  # the source's threads and handles do not survive a fork
        initializer=_start_worker,
        initargs=(source, plan, out),
    ) as pool:
        tasks = [pool.submit(_write_shard_here, number) for number in numbers]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_here: tuple[Source, Plan, Path] | None = None


def _start_worker(source: Source, plan: Plan, out: Path) -> None:
    global _here
    _here = source, plan, out
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _write_shard_here(number: int) -> _Record:
    assert _here is not None
    return _write_shard(*_here, number)


def _write_shard(source: Source, plan: Plan, out: Path, number: int) -> _Record:
    name, damage, samples = plan.name(number), list[Damage](), 0
    partial = out / _STATE / f"{name}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        hashing = _Hashing(file)
        stream = cast(BinaryIO, hashing)  # a stream is only ever written to
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for position in plan.positions(number):
                try:
                    members = _members(source.content(position))
                except SampleError as error:
                    damage.append(error.damage)
                    continue
                except Unusable as error:
                    where, key = source.locate(position)
                    damage.append(sample_error(str(where), key, error).damage)
                    continue
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{position:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                samples += 1
        file.flush()
        os.fsync(file.fileno())
    partial.replace(out / name)
    entry = ShardEntry(name, hashing.size, hashing.digest.hexdigest(), samples)
    stored = {"entry": asdict(entry), "damage": [asdict(found) for found in damage]}
    _write_whole(out / _STATE / f"{name}.json", json.dumps(stored))
    return _Record(number, entry, damage)


def _members(content: Content) -> dict[str, bytes]:
    """Members of a sample by extension; raises `Unusable` where the picture cannot be decoded."""
    members = {"txt": content.caption.encode()}
    if content.class_index is not None:
        members["cls"] = str(content.class_index).encode()
    members["json"] = json.dumps({"source_key": content.key}).encode()
    # At an eighth of the scale: all bytes of a JPEG are read, and hardly anything is computed.
    decode = ImageDecoder(smallest=1)
    picture = decode(content.image)
    extension = _EXTENSIONS.get(decode.facts(content.image).format)
    if extension is None:
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        return {"png": buffer.getvalue(), **members}
    return {extension: content.image, **members}


class _Hashing:
    """A file to write to that knows the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)


# the folder -------------------------------------------------------------------------------------


@contextmanager
def _owned(out: Path, plan: Plan) -> Generator[None]:
    """The folder, with its `.pack` as long as it is not complete, kept from other processes."""
    state = out / _STATE
    _check_folder(out, plan)
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being filled by another process: wait for it") from None
        _write_whole(state / "plan.json", json.dumps(asdict(plan)))
        for leftover in state.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        yield
        # Nothing but the manifest and the report tell of a complete pack.
        shutil.rmtree(state, ignore_errors=True)


def _complete(plan: Plan, out: Path) -> Packed | None:
    """What an earlier start made of the same plan, if that is complete."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        entries = list(parse_manifest((out / MANIFEST).read_bytes()).values())
        sizes = [(out / entry.name).stat().st_size for entry in entries]
    except (OSError, ValueError):
        return None
    same = all(report.get(key) == value for key, value in asdict(plan).items())
    if not same or sizes != [entry.size for entry in entries]:
        return None
    return Packed(entries, len(entries), DamageLog.from_report(report["damage"]))


def _check_folder(out: Path, plan: Plan) -> None:
    for path in (out / _STATE / "plan.json", out / REPORT):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        stored = {key: stored.get(key) for key in asdict(plan)}
        if stored != asdict(plan):
            raise UserError(
                f"{out} holds another pack ({_words(stored)}), not {_words(asdict(plan))}: choose "
                "another --out, or remove it"
            )
        return
    if any(out.glob("*.tar")):
        raise UserError(f"{out} already holds tar files that no pack made: choose another --out")


def _words(plan: dict[str, object]) -> str:
    return f"{plan['samples']} samples of {plan['source']}, {plan['shard_samples']} a shard"


def _write_whole(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
