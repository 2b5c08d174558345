"""Folders of embeddings with given features, for benchmarks and tests of search."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neuclip.data.damage import DamageLog
from neuclip.embedding.embedding_store import EmbeddingStore, StoreManifest
from neuclip.embedding.shard_files import EmbeddedShard, Form


def write_store(
    folder: Path,
    features: np.ndarray,
    *,
    shard_samples: int = 10_000,
    form: Form = "npy",
    captions: Sequence[str] | None = None,
) -> EmbeddingStore:
    """Writes unit-norm rows as the features of images 0, 1, ..., of which each has its key."""
    manifest = StoreManifest(
        model="c" * 64, model_name="given", arch="given", preprocessing={}, precision="fp32",
        source="given", source_digest="given", samples=len(features), dim=features.shape[1],
        dtype=str(features.dtype), texts=False, form=form, batch_size=1,
        shard_samples=shard_samples,
    )  # fmt: skip
    store = EmbeddingStore.begin(folder, manifest)
    captions = captions or [f"image {row}" for row in range(len(features))]
    for shard in range(store.num_shards):
        rows = store.positions(shard)
        keys, texts = [str(row) for row in rows], [captions[row] for row in rows]
        store.write(shard, EmbeddedShard(rows, keys, texts, features[rows], None), DamageLog())
    return store
