"""The images of a folder of embeddings, to search: checked, mapped, and safe from cut files."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from given_features import write_store

from embedding_folders import embedded
from neuclip.embedding import stored_images
from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError


@pytest.fixture
def store(pictures, tmp_path):
    """Eleven pictures in shards of four, of which one is damaged."""
    (pictures / "005.png").write_bytes(b"no picture")
    return embedded(pictures, tmp_path / "out")


def rows_of(store):
    return np.concatenate([shard.images for shard in store.shards()])


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_what_is_there(pictures, tmp_path, form):
    (pictures / "005.png").write_bytes(b"no picture")
    store = embedded(pictures, tmp_path / "out", form=form)
    images = StoredImages.open(store)
    assert len(images) == 10 and images.dim == 64
    assert images.positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [images.row_of(place) for place in (0, 5, 6, 10, 11)] == [0, None, 5, 9, None]
    assert images.keys[5] == "006" and images.captions[5] == "number 10"
    rows = rows_of(store)
    assert [start for start, _ in images.blocks()] == [0, 4, 7]
    assert np.array_equal(np.concatenate([rows for _, rows in images.blocks()]), rows)
    some = np.array([0, 3, 4, 9])
    assert np.array_equal(images.features(some), rows[some])


def test_features_are_mapped_and_the_files_stay_as_they_are(store):
    before = rows_of(store)
    images = StoredImages.open(store)
    assert all(not part.rows.flags.owndata for part in images.parts)
    for _, rows in images.blocks():
        rows[:] = 0  # of this process only
    assert np.array_equal(rows_of(store), before)


def test_a_digest_names_the_features(store, tmp_path):
    digest = StoredImages.open(store).digest
    assert StoredImages.open(store).digest == digest
    path = store.folder / "img_emb" / "img_emb_00001.npy"
    rows = np.load(path)
    np.save(path, rows[::-1])
    assert StoredImages.open(store).digest != digest
    np.save(path, rows)
    assert StoredImages.open(store).digest == digest


def test_a_file_that_is_cut_while_in_use(store):
    images = StoredImages.open(store)
    path = store.folder / "img_emb" / "img_emb_00001.npy"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"img_emb_00001\.npy was cut while in use: start again"):
        list(images.blocks())
    with pytest.raises(UserError, match="cut while in use"):
        images.features(np.array([5]))


def test_a_file_that_is_replaced_stays_mapped(store):
    images = StoredImages.open(store)
    before = images.features(np.arange(10))
    store.write(1, store.read(2), store.summary()[1])
    assert np.array_equal(images.features(np.arange(10)), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows * 2, "4 rows not of unit norm"),
        (lambda rows: np.where(np.arange(4)[:, None] == 1, np.nan, rows), "1 row not of unit norm"),
        (lambda rows: rows[:, :5], "shapes"),
        (lambda rows: rows[:3], "shapes"),
    ],
)
def test_damaged_features_are_named(store, change, words):
    path = store.folder / "img_emb" / "img_emb_00000.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=rf"shard 0 is damaged \({words}\): remove .*00000\.json"):
        StoredImages.open(store)


@pytest.mark.parametrize("places", [[4, 4, 7], [7, 6, 4], [4, 6, 8], [3, 4, 6]])
def test_positions_that_cannot_be(store, places):
    path = store.folder / "metadata" / "metadata_00001.jsonl"
    text = path.read_text()
    for old, new in zip((4, 6, 7), places, strict=True):
        text = text.replace(f'"position": {old}', f'"position": {-new}')
    path.write_text(text.replace('": -', '": '))
    with pytest.raises(UserError, match=r"shard 1 is damaged \(positions of another shard\)"):
        StoredImages.open(store)


def test_a_folder_that_is_not_complete(store):
    (store.folder / "finished" / "00001.json").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        StoredImages.open(EmbeddingStore.open(store.folder))


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    store = write_store(tmp_path / "out", np.ones((40, 1), np.float32), shard_samples=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len([*Path("/proc/self/fd").iterdir()]) + 20
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        assert len(StoredImages.open(store)) == 40  # the limit was raised
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few + 40
        monkeypatch.setattr(stored_images, "_OTHER_FILES", 2**60)
        with pytest.raises(UserError, match="has 40 shards, more files than a process may open"):
            StoredImages.open(store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
