"""Writes any source as tar shards with a manifest: in parallel, and resumable after a kill.

The folder then contains `00000.tar`, `00001.tar`, ..., `manifest.json` with their sizes and
checksums, and `pack_report.json` with the samples left out. While it is being filled, its folder
`.pack/` contains a record of every complete shard; a second start writes the shards without a
record. The bytes depend only on the source, not on the number of processes.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, cast

from neuclip.data.damage import DamageLog
from neuclip.data.decode import ImageDecoder
from neuclip.data.progress import Progress
from neuclip.data.remote.manifest import MANIFEST, ShardEntry, manifest_text, parse_manifest
from neuclip.data.samples import Damage, DamageKind, Sample, SampleError
from neuclip.data.shard_writer import add_sample
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity
from neuclip.files import describe, no_link, replacing
from neuclip.interrupts import end_with_parent
from neuclip.untrusted import read_json

REPORT = "pack_report.json"

_STATE = ".pack"
_MAX_REPORT = 2**27  # bytes
_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a source is divided into shards; a second start must have the same plan.

    Attributes:
        source: the user's name of the source.
        samples: number of samples in the source.
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
        """Positions of the samples of a shard."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.samples))


@dataclass(frozen=True)
class Packed:
    """The result of packing.

    Attributes:
        shards: the entries of the manifest.
        reused: number of shards that an earlier start wrote.
        log: samples left out.
        several_captions: number of samples with more than one caption.
    """

    shards: list[ShardEntry]
    reused: int
    log: DamageLog
    several_captions: int = 0


def pack(
    source: Source, plan: Plan, out: Path, *, workers: int = 1, progress: Progress | None = None
) -> Packed:
    """Writes a source as tar shards, or the shards that an earlier start did not finish.

    Keys are positions in the source, so they can serve as sample ids (`--data-size`); the `.json`
    of a sample contains its original key, and all captions; the `.txt` contains the first caption,
    and is left out if there is none. Image files are copied unchanged. Corrupt samples are
    left out and reported; a shard of which every sample is corrupt is not written.

    Args:
        source: the source to read.
        plan: how it is divided into shards.
        out: folder to fill.
        workers: writing processes, one shard each at a time.
        progress: called for each shard.

    Raises:
        UserError: no sample can be read, or the folder is used otherwise, is being filled, or is
            not writable.
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
            f"cannot write {where}: {describe(error)}; finished shards are kept, and the "
            "same command continues"
        ) from None
    except BrokenProcessPool:
        raise UserError(
            "a writing process was killed (out of memory?): repeat the command, with fewer "
            "--workers if necessary; it continues where it stopped"
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
        if record.entry.samples:
            entries.append(record.entry)
        log.add(record.damage)
    if not entries:
        shutil.rmtree(out / _STATE, ignore_errors=True)
        raise UserError(
            f"none of {quantity(plan.samples, 'sample')} of {plan.source} can be read "
            f"({log.summary()}), so there is nothing to pack; the first: {log.examples[0]}"
        )
    several = sum(record.several_captions for record in records.values() if record is not None)
    report = {**asdict(plan), "several_captions": several, "damage": log.report()}
    _write_whole(out / REPORT, json.dumps(report, indent=2))
    _write_whole(out / MANIFEST, manifest_text(entries))
    return Packed(entries, reused, log, several)


# one shard --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A complete shard."""

    number: int
    entry: ShardEntry
    damage: list[Damage]
    several_captions: int


def _record(plan: Plan, out: Path, number: int) -> _Record | None:
    """The record of a shard, or None if there is none or the shard has another size."""
    try:
        stored = read_json(out / _STATE / f"{plan.name(number)}.json", _MAX_REPORT)
        entry = ShardEntry(**stored["entry"])
        damage = [
            Damage(each["shard"], each["key"], cast(DamageKind, each["kind"]), each["detail"])
            for each in stored["damage"]
        ]
        several = int(stored["several_captions"])
        complete = not entry.samples or (out / entry.name).stat().st_size == entry.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Record(number, entry, damage, several) if complete else None


def _written(
    source: Source, plan: Plan, out: Path, numbers: list[int], workers: int
) -> Generator[_Record]:
    """Writes shards, and yields their records in order of completion."""
    if workers <= 1 or len(numbers) <= 1:
        for number in numbers:
            yield _write_shard(source, plan, out, number)
        return
    with ProcessPoolExecutor(
        min(workers, len(numbers)),
        mp_context=get_context("spawn"),  # threads and handles of the source do not survive a fork
        initializer=_start_worker,
        initargs=(source, plan, out),
    ) as pool:
        tasks = [pool.submit(_write_shard_of_job, number) for number in numbers]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Source, Plan, Path] | None = None  # of this worker process


def _start_worker(source: Source, plan: Plan, out: Path) -> None:
    global _job
    _job = source, plan, out
    end_with_parent()


def _write_shard_of_job(number: int) -> _Record:
    assert _job is not None
    return _write_shard(*_job, number)


def _write_shard(source: Source, plan: Plan, out: Path, number: int) -> _Record:
    name, damage, samples, several = plan.name(number), list[Damage](), 0, 0
    partial = out / _STATE / f"{name}.{os.getpid()}.partial"
    with partial.open("xb") as file:
        hashing = _Hashing(file)
        stream = cast(BinaryIO, hashing)  # tarfile only calls `write`
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for position in plan.positions(number):
                try:
                    sample = source.read_with(position, _packed_image)
                except SampleError as error:
                    damage.append(error.damage)
                    continue
                add_sample(tar, f"{position:09d}", _members(sample))
                samples += 1
                several += len(sample.captions) > 1
        file.flush()
        os.fsync(file.fileno())
    if samples:
        partial.replace(out / name)
    else:
        partial.unlink()
    entry = ShardEntry(name, hashing.size, hashing.digest.hexdigest(), samples)
    stored = {
        "entry": asdict(entry),
        "damage": [asdict(found) for found in damage],
        "several_captions": several,
    }
    _write_whole(out / _STATE / f"{name}.json", json.dumps(stored))
    return _Record(number, entry, damage, several)


@dataclass(frozen=True)
class _PackedImage:
    extension: str
    content: bytes


def _packed_image(content: bytes) -> _PackedImage:
    """Checks an image file; formats without an extension of their own become PNG."""
    # At an eighth of the scale: all bytes of a JPEG are read, and hardly anything is computed.
    decode = ImageDecoder(smallest=1)
    image = decode(content)
    extension = _EXTENSIONS.get(decode.facts(content).format)
    if extension is not None:
        return _PackedImage(extension, content)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return _PackedImage("png", buffer.getvalue())


def _members(sample: Sample[_PackedImage]) -> dict[str, bytes]:
    """Members of a sample by extension."""
    members = {sample.image.extension: sample.image.content}
    if sample.captions:
        members["txt"] = sample.caption.encode()
    if sample.class_index is not None:
        members["cls"] = str(sample.class_index).encode()
    facts = {"source_key": sample.key, "captions": sample.captions}
    members["json"] = json.dumps(facts).encode()
    return members


class _Hashing:
    """A file to write to, with the checksum and size of its content."""

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
    """Locks the folder against other processes, and keeps `.pack` until it is complete."""
    state = out / _STATE
    _check_folder(out, plan)
    if state.is_symlink():  # another user of a shared folder may have made it
        raise UserError(f"{state} is a link: remove it")
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w", opener=no_link) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being filled by another process: wait for it") from None
        _write_whole(state / "plan.json", json.dumps(asdict(plan)))
        for leftover in state.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        yield
        # A complete folder is recognized by its manifest and report alone.
        shutil.rmtree(state, ignore_errors=True)


def _complete(plan: Plan, out: Path) -> Packed | None:
    """The result of an earlier start with the same plan, or None if it is not complete."""
    try:
        report = read_json(out / REPORT, _MAX_REPORT)
        entries = list(parse_manifest((out / MANIFEST).read_bytes()).values())
        sizes = [(out / entry.name).stat().st_size for entry in entries]
    except (OSError, ValueError):
        return None
    same = all(report.get(key) == value for key, value in asdict(plan).items())
    if not same or sizes != [entry.size for entry in entries]:
        return None
    log = DamageLog.from_report(report["damage"])
    return Packed(entries, len(entries), log, report.get("several_captions", 0))


def _check_folder(out: Path, plan: Plan) -> None:
    for path in (out / _STATE / "plan.json", out / REPORT):
        try:
            stored = read_json(path, _MAX_REPORT)
        except (OSError, ValueError):
            continue
        stored = {key: stored.get(key) for key in asdict(plan)}
        if stored != asdict(plan):
            raise UserError(
                f"{out} holds another pack ({_words(stored)}), not {_words(asdict(plan))}: choose "
                "another --out, or remove the folder"
            )
        return
    if any(out.glob("*.tar")):
        raise UserError(f"{out} contains tar files of other origin: choose another --out")


def _words(plan: dict[str, object]) -> str:
    return f"{plan['samples']} samples of {plan['source']}, {plan['shard_samples']} per shard"


def _write_whole(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
