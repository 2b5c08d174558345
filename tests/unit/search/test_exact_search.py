"""Exact search against a double loop in float64."""

import numpy as np
import pytest
import torch
from given_features import write_store

from neuclip.embedding.stored_images import StoredImages
from neuclip.search import exact_search
from neuclip.search.exact_search import ExactSearch


def opened(features, tmp_path, **settings):
    return StoredImages.open(write_store(tmp_path / "out", features, **settings))


def unit(rows, dim, seed):
    found = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def expected(features, query, number, among=None):
    scores = [sum(float(a) * float(b) for a, b in zip(row, query, strict=True)) for row in features]
    rows = [row for row in range(len(scores)) if among is None or among[row]]
    best = sorted(rows, key=lambda row: (-scores[row], row))[:number]
    return best, [scores[row] for row in best]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_the_best_of_all(tmp_path, monkeypatch, dtype, form):
    monkeypatch.setattr(exact_search, "_CONVERTED", 3)
    features = unit(50, 8, seed=0)
    images = opened(features.astype(dtype), tmp_path, shard_samples=7, form=form)
    search = ExactSearch(images)
    for number, query in enumerate(unit(5, 8, seed=1), start=1):
        found = search.nearest(torch.from_numpy(query), 3 * number)
        rows, scores = expected(features.astype(dtype), query, 3 * number)
        assert found.rows.tolist() == rows
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_some_of_them(tmp_path):
    features = unit(20, 4, seed=0)
    search = ExactSearch(opened(features, tmp_path, shard_samples=6))
    (query,) = unit(1, 4, seed=1)
    for rows in (np.arange(0, 20, 3), np.array([5, 18]), np.empty(0, np.int64)):
        found = search.nearest(torch.from_numpy(query), 5, rows)
        best, scores = expected(features, query, 5, np.isin(np.arange(20), rows))
        assert found.rows.tolist() == best
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_equal_scores_come_in_the_order_of_the_images(tmp_path):
    features = np.repeat(np.eye(2, dtype=np.float32), [30, 30], axis=0)
    search = ExactSearch(opened(features, tmp_path, shard_samples=8))
    found = search.nearest(torch.tensor([0.0, 1.0]), 60)
    assert found.rows.tolist() == [*range(30, 60), *range(30)]
