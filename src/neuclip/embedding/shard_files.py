"""The files of one shard of embeddings: as numpy arrays with metadata, or as one parquet table.

The folders `img_emb` and `text_emb` are laid out as by `clip-retrieval inference`.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neuclip.data.sources.arrow_columns import pyarrow
from neuclip.files import replacing
from neuclip.untrusted import open_regular, parse_json, read_file

Form = Literal["npy", "parquet"]
Rows = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True)
class EmbeddedShard:
    """Some consecutive samples of a source; those that could not be read are left out.

    Attributes:
        positions: [rows] position of each sample in the source, ascending.
        keys: the samples' keys.
        captions: the first caption of each sample; empty if it has none.
        images: [rows, dim] unit-norm features of the images.
        texts: [rows, dim] unit-norm features of the first captions; None if there are none.
    """

    positions: NDArray[np.int64]
    keys: list[str]
    captions: list[str]
    images: Rows
    texts: Rows | None

    def __len__(self) -> int:
        return len(self.keys)


def shard_paths(folder: Path, form: Form, shard: int, *, texts: bool) -> list[Path]:
    """The files of a shard.

    Args:
        folder: of all shards.
        form: of the files.
        shard: its number, from 0.
        texts: whether there are features of captions.
    """
    if form == "parquet":
        return [folder / "parquet" / f"embeddings_{shard:05}.parquet"]
    names = [("img_emb", "npy"), ("metadata", "jsonl"), *([("text_emb", "npy")] if texts else [])]
    return [folder / name / f"{name}_{shard:05}.{ending}" for name, ending in names]


def write_shard(paths: list[Path], content: EmbeddedShard) -> None:
    """Writes a shard to the files of `shard_paths`; each is complete or absent.

    Raises:
        OSError: a file cannot be written.
        UserError: the form is parquet, and pyarrow is missing.
    """
    if paths[0].suffix == ".parquet":
        _write_table(paths[0], content)
        return
    lines = [
        json.dumps({"key": key, "position": position, "caption": caption}) + "\n"
        for key, position, caption in zip(
            content.keys, content.positions.tolist(), content.captions, strict=True
        )
    ]
    arrays = [content.images, None, content.texts]
    for path, array in zip(paths, arrays, strict=False):
        with replacing(path) as file:
            if array is None:
                file.write("".join(lines).encode())
            else:
                np.save(file, array, allow_pickle=False)


def read_shard(paths: list[Path]) -> EmbeddedShard:
    """Reads a shard.

    Raises:
        UserError: the form is parquet, and pyarrow is missing.
        Exception: one of `DAMAGED_ARRAYS`: a file is missing or not as `write_shard` writes it.
    """
    if paths[0].suffix == ".parquet":
        return _read_table(paths[0])
    arrays = [_array(path) for path in paths if path.suffix == ".npy"]
    entries = [parse_json(line) for line in read_file(paths[1]).splitlines()]
    return EmbeddedShard(
        np.array([entry["position"] for entry in entries], dtype=np.int64),
        [str(entry["key"]) for entry in entries],
        [str(entry["caption"]) for entry in entries],
        arrays[0],
        arrays[1] if len(arrays) > 1 else None,
    )


def _array(path: Path) -> Rows:
    with open_regular(path) as file:
        return np.load(file, allow_pickle=False)


def _write_table(path: Path, content: EmbeddedShard) -> None:
    arrow = pyarrow(path)
    columns: dict[str, Any] = {
        "key": arrow.array([_encodable(key) for key in content.keys], arrow.string()),
        "position": arrow.array(content.positions),
        "caption": arrow.array([_encodable(text) for text in content.captions], arrow.string()),
    }
    for name, rows in (("image_embedding", content.images), ("text_embedding", content.texts)):
        if rows is not None:
            values = arrow.array(rows.reshape(-1))
            columns[name] = arrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
    with replacing(path) as file:
        importlib.import_module("pyarrow.parquet").write_table(arrow.table(columns), file)


def _read_table(path: Path) -> EmbeddedShard:
    arrow = pyarrow(path)
    with open_regular(path) as file:
        parquet = importlib.import_module("pyarrow.parquet")
        try:
            table = parquet.read_table(file, use_threads=False)
        except arrow.ArrowException as error:
            raise ValueError(str(error)) from error

    def vectors(name: str) -> Rows | None:
        if name not in table.column_names:
            return None
        column = table.column(name)
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, column.type.list_size)

    images = vectors("image_embedding")
    if images is None:
        raise ValueError("no column 'image_embedding'")
    return EmbeddedShard(
        table.column("position").to_numpy(),
        table.column("key").to_pylist(),
        table.column("caption").to_pylist(),
        images,
        vectors("text_embedding"),
    )


def _encodable(text: str) -> str:
    """A text that may hold bytes other than UTF-8, which are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
