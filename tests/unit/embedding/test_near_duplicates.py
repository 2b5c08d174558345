"""Groups of near duplicates over several shards, against a loop over all pairs."""

import numpy as np
import pytest
import torch

from embedding_folders import COLORS, embedded
from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.embedding.near_duplicates import near_duplicates


def naive(features, threshold):
    """The least row that each row is connected to, and its largest similarity of a duplicate."""
    similar = features.astype(np.float64) @ features.astype(np.float64).T
    groups, best = list(range(len(features))), [0.0] * len(features)
    for _ in groups:  # joined as often as a chain may be long
        for a in range(len(groups)):
            for b in range(len(groups)):
                if a != b and similar[a, b] >= threshold:
                    groups[a] = groups[b] = min(groups[a], groups[b])
                    best[a] = max(best[a], similar[a, b])
    return groups, best


@pytest.mark.parametrize("threshold", [0.7, 0.95])
def test_agrees_with_loops_and_reads_no_shard_for_its_size(
    pictures, tmp_path, monkeypatch, threshold
):
    (pictures / "002.png").write_bytes(b"no picture")
    store = embedded(pictures, tmp_path / "out")
    shards = list(store.shards())
    assert store.rows() == [len(shard) for shard in shards] == [3, 4, 3]
    read = []
    whole = EmbeddingStore.read
    monkeypatch.setattr(EmbeddingStore, "read", lambda *key: read.append(key[1]) or whole(*key))
    found = near_duplicates(store, threshold, torch.device("cpu"))
    assert read == [0, 1, 2, 1, 2, 2]  # pairs (0, 0) (0, 1) (0, 2) (1, 1) (1, 2) (2, 2)
    groups, best = naive(np.concatenate([shard.images for shard in shards]), threshold)
    assert found.groups.tolist() == groups
    assert 1 < len(set(groups)) < len(groups)
    np.testing.assert_allclose(found.similarity, best, atol=1e-6)
    rows = [row for row in range(len(COLORS)) if row != 2]
    assert found.positions.tolist() == rows
    assert found.keys == [f"{row:03}" for row in rows]
    assert found.captions == [f"number {COLORS[row][0]}" for row in rows]
