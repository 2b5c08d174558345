"""A folder of embeddings: shards with keys, and a manifest that says what they are.

A shard holds the samples of a range of positions in the source. Its record in `finished` is
written last, so a killed process leaves finished shards and nothing else that counts:

    manifest.json                  model, preprocessing, data and settings
    img_emb/img_emb_00000.npy      features of images; text_emb/ and metadata/ beside it
    finished/00000.json            number of rows, and the corrupt samples that were left out
    embeddings.lock                the process that fills the folder now
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuclip.data.damage import DamageLog
from neuclip.embedding.mapped_array import MappedArray
from neuclip.embedding.shard_files import (
    EmbeddedShard,
    Form,
    read_shard,
    shard_paths,
    write_shard,
)
from neuclip.errors import UserError, printable, quantity
from neuclip.files import cannot_write, write_whole, writing
from neuclip.parallel.folder_lock import LockedKind
from neuclip.untrusted import DAMAGED_ARRAYS, read_file, read_json

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**20  # bytes
_LOCK = "embeddings.lock"
MOST_SHARDS = 1_000_000


_FLAGS = {
    "dtype": "--dtype",
    "texts": "--enable-text",
    "form": "--format",
    "batch_size": "--batch-size",
    "shard_samples": "--shard-samples",
}
"""The flag of `neuclip embed` that chooses a setting."""


class StoreManifest(BaseModel):
    """What a folder of embeddings holds.

    Attributes:
        version: of the folder's layout.
        model: SHA-256 of architecture, preprocessing and weights.
        model_name: what the user calls the model.
        arch: the architecture.
        preprocessing: of images, for readers of the file; `model` covers it.
        precision: arithmetic of the towers.
        source: the data as the user names them; secrets are masked.
        source_digest: digest of the files of the data, their sizes and times.
        samples: number of samples, corrupt ones included.
        dim: dimension of the features.
        dtype: type of the features.
        unit_norm: features have unit norm.
        texts: whether there are features of captions.
        form: of the files.
        batch_size: samples per forward pass, which decides the last bits of features.
        shard_samples: samples per shard, a multiple of the batch size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    model: str
    model_name: str
    arch: str
    preprocessing: dict[str, Any]
    precision: str
    source: str
    source_digest: str
    samples: int = Field(ge=1)
    dim: int = Field(ge=1)
    dtype: Literal["float32", "float16"]
    unit_norm: Literal[True] = True
    texts: bool
    form: Form
    batch_size: int = Field(ge=1)
    shard_samples: int = Field(ge=1)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_samples)

    @model_validator(mode="after")
    def _few_shards(self) -> "StoreManifest":
        if self.num_shards > MOST_SHARDS:
            raise ValueError(f"{self.num_shards:,} shards are more than {MOST_SHARDS:,}")
        return self

    @property
    def digest(self) -> str:
        """Name of a folder for these embeddings: equal for all that may share it."""
        content = self.model_dump_json(exclude={"model_name", "source"})
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def difference(self, wanted: "StoreManifest") -> str | None:
        """Why a folder with this manifest cannot be used for another; None if it can."""
        if self.model != wanted.model:
            return self._other_model(wanted)
        if (self.source_digest, self.samples) != (wanted.source_digest, wanted.samples):
            name = printable(self.source)
            return f"other data, or of these data before they changed or by another path ({name})"
        names = ("precision", "dim", "dtype", "texts", "form", "batch_size", "shard_samples")
        old, new = (
            {_FLAGS.get(name, name): getattr(each, name) for name in names}
            for each in (self, wanted)
        )
        differ = _differences(old, new)
        return f"other settings ({differ})" if differ else None

    def _other_model(self, wanted: "StoreManifest") -> str:
        old, new = (
            f"{printable(each.model_name)} ({printable(each.arch)})" for each in (self, wanted)
        )
        # As JSON, in which tuples are lists.
        settings = [each.model_dump(mode="json")["preprocessing"] for each in (self, wanted)]
        differ = _differences(*settings)
        if differ:
            return f"another preprocessing: {old} with {differ} of {new}"
        other = f"not {new}" if old != new else "with other weights than it has now"
        return f"another model: {old}, {other}"

    def with_settings_of(self, kept: "StoreManifest") -> "StoreManifest":
        """The manifest of these embeddings in the form that a folder already has."""
        names = ("dtype", "texts", "form", "batch_size", "shard_samples")
        return self.model_copy(update={name: getattr(kept, name) for name in names})


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The entries of one record that another has otherwise, in a few words."""
    return "; ".join(
        f"{name} {printable(str(value))}, not {printable(str(new.get(name)))}"
        for name, value in old.items()
        if value != new.get(name)
    )


class EmbeddingStore:
    """Embeddings on disk.

    Args:
        folder: the folder.
        manifest: what it holds.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def begin(cls, folder: Path, manifest: StoreManifest) -> "EmbeddingStore":
        """Starts a folder, or goes on with one that was begun with the same manifest.

        Raises:
            UserError: the folder holds something else, or cannot be written to.
        """
        if is_store(folder):
            store = cls.open(folder)
            difference = store.manifest.difference(manifest)
            if difference is not None:
                raise UserError(
                    f"{folder} holds embeddings of {difference}: choose another folder, or remove "
                    "this one"
                )
            return store
        if folder.is_dir() and not all(map(_is_passing, folder.iterdir())):
            raise UserError(
                f"{folder} is not empty, and has no {MANIFEST} of embeddings: choose another folder"
            )
        write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path) -> "EmbeddingStore":
        """Opens a folder, whether all shards are finished or not.

        Raises:
            UserError: it is not a folder of embeddings, or its manifest is damaged.
        """
        try:
            content = read_file(folder / MANIFEST, _LARGEST_MANIFEST)
            manifest = StoreManifest.model_validate_json(content)
        except OSError as error:
            raise UserError(
                f"{folder} is not a folder of embeddings: {MANIFEST}: {error.strerror}"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise UserError(
                f"{folder / MANIFEST} is damaged, or of another version of neuclip: "
                f"{where}{first['msg']}; restore it, or embed again into another folder"
            ) from None
        return cls(folder, manifest)

    @property
    def num_shards(self) -> int:
        """Number of shards, finished or not."""
        return self.manifest.num_shards

    def positions(self, shard: int) -> NDArray[np.int64]:
        """The positions in the source of the samples of a shard."""
        start = shard * self.manifest.shard_samples
        end = min(start + self.manifest.shard_samples, self.manifest.samples)
        return np.arange(start, end, dtype=np.int64)

    def pending(self) -> list[int]:
        """The shards that are not finished."""
        return [shard for shard in range(self.num_shards) if self._finished(shard) is None]

    def write(self, shard: int, content: EmbeddedShard, damage: DamageLog) -> None:
        """Writes a shard, and then that it is finished.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        paths = self._paths(shard)
        with writing(paths[0]):
            write_shard(paths, content)
        record = {"rows": len(content), "damage": damage.report()}
        write_whole(self._record(shard), json.dumps(record) + "\n")

    def read(self, shard: int) -> EmbeddedShard:
        """Reads a finished shard.

        Raises:
            UserError: it is not finished, or a file of it is missing or damaged.
        """
        found, manifest = self._finished(shard), self.manifest
        if found is None:
            raise UserError(f"{self.folder}: shard {shard} is not finished: {self._again(shard)}")
        try:
            content = read_shard(self._paths(shard))
        except UserError:
            raise
        except DAMAGED_ARRAYS as error:
            raise self.damaged(shard, str(error)) from None
        shape, kind = (found[0], manifest.dim), np.dtype(manifest.dtype)
        arrays = [content.images] + ([] if content.texts is None else [content.texts])
        fits = all(array.shape == shape and array.dtype == kind for array in arrays)
        same = len(content.keys) == len(content.positions) == len(content.captions) == found[0]
        if not fits or not same or (content.texts is not None) != manifest.texts:
            raise self.damaged(shard, "shapes")
        return content

    def mapped(self, shard: int) -> MappedArray | None:
        """The features of the images of a finished shard, memory-mapped; None in a table.

        Raises:
            OSError: the file cannot be mapped.
            UserError: it is damaged.
        """
        if self.manifest.form != "npy":
            return None
        try:
            return MappedArray(self._paths(shard)[0])
        except OSError:
            raise
        except DAMAGED_ARRAYS as error:
            raise self.damaged(shard, str(error)) from None

    def damaged(self, shard: int, how: str) -> UserError:
        """The error for a damaged shard, with the remedy."""
        return UserError(f"{self.folder}: shard {shard} is damaged ({how}): {self._again(shard)}")

    def _again(self, shard: int) -> str:
        return f"remove {self._record(shard)} and repeat the command that wrote it"

    def shards(self) -> Iterator[EmbeddedShard]:
        """All shards in order, one at a time in memory.

        Raises:
            UserError: one is not finished or damaged.
        """
        self.require_complete()
        return map(self.read, range(self.num_shards))

    def require_complete(self) -> None:
        """Checks that all shards are finished, and hold at least one row.

        Raises:
            UserError: some are not, or all samples were corrupt.
        """
        pending = len(self.pending())
        if pending:
            raise UserError(
                f"{self.folder} is not complete: {pending} of {quantity(self.num_shards, 'shard')} "
                "are missing; repeat the command that wrote it, which goes on where it stopped"
            )
        rows, damage = self.summary()
        if not rows:
            raise UserError(
                f"{self.folder} holds no embedding: all samples were corrupt ({damage.summary()})"
            )

    def rows(self) -> list[int]:
        """Number of rows of each shard, 0 if it is not finished."""
        records = map(self._finished, range(self.num_shards))
        return [0 if found is None else found[0] for found in records]

    def summary(self) -> tuple[int, DamageLog]:
        """Number of rows in finished shards, and the corrupt samples that were left out."""
        rows, damage = 0, DamageLog()
        for shard in range(self.num_shards):
            found = self._finished(shard)
            if found is not None:
                rows += found[0]
                damage.add_report(found[1].report())
        return rows, damage

    def remove_leftovers(self) -> None:
        """Removes the parts of files that killed processes have left behind."""
        for path in filter(_is_leftover, self.folder.rglob(".*")):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from None

    def _finished(self, shard: int) -> tuple[int, DamageLog] | None:
        """Rows and corrupt samples of a shard; None if it is to be embedded (again)."""
        try:
            record = read_json(self._record(shard))
            rows, damage = record["rows"], DamageLog.from_report(record["damage"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        whole = isinstance(rows, int) and all(path.is_file() for path in self._paths(shard))
        return (rows, damage) if whole else None

    def _record(self, shard: int) -> Path:
        return self.folder / "finished" / f"{shard:05}.json"

    def _paths(self, shard: int) -> list[Path]:
        manifest = self.manifest
        return shard_paths(self.folder, manifest.form, shard, texts=manifest.texts)


def _is_leftover(path: Path) -> bool:
    """Whether a file is the part that a killed process has left; see `neuclip.files.replacing`."""
    return path.name.startswith(".") and path.suffix == ".partial"


def _is_passing(path: Path) -> bool:
    """Whether a file may lie in a folder that holds nothing yet: a leftover, or the lock."""
    return _is_leftover(path) or path.name == _LOCK


def locked_kind(flag: str) -> LockedKind:
    """What locks a folder of embeddings while it is filled.

    Args:
        flag: that names the folder, for messages.
    """
    return LockedKind("folder of embeddings", _LOCK, flag, flag)


def is_complete(folder: Path) -> bool:
    """Whether a folder has the manifest of embeddings, and all shards.

    Raises:
        UserError: the manifest is damaged.
    """
    return is_store(folder) and not EmbeddingStore.open(folder).pending()


def is_store(folder: Path) -> bool:
    """Whether a folder has the manifest of embeddings."""
    return (folder / MANIFEST).is_file()
