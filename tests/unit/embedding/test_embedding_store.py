"""A folder of embeddings: right features, and resumable wherever its process is killed."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from datacomp_sets import CodedTowers
from embedding_folders import COLORS, content, embedded
from neuclip.embedding import embedding_store
from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.errors import UserError


def expected(rows):
    towers = CodedTowers()
    colors = torch.tensor([COLORS[row] for row in rows]) / 255
    images = towers.encode_image(colors[:, :, None, None].expand(-1, -1, 8, 8))
    return images.numpy(), np.eye(64, dtype=np.float32)[[COLORS[row][0] for row in rows]]


@pytest.mark.parametrize("form", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_with_keys(pictures, tmp_path, form, dtype):
    store = embedded(pictures, tmp_path / "out", form=form, dtype=dtype)
    shards = list(EmbeddingStore.open(tmp_path / "out").shards())
    assert [len(shard) for shard in shards] == [4, 4, 3]
    assert store.summary()[0] == 11
    images, texts = expected(range(11))
    found = np.concatenate([shard.images for shard in shards])
    assert found.dtype == dtype
    assert np.array_equal(found, images.astype(dtype))
    assert np.array_equal(np.concatenate([shard.texts for shard in shards]), texts.astype(dtype))
    assert [key for shard in shards for key in shard.keys] == [f"{row:03}" for row in range(11)]
    assert shards[1].captions == [f"number {COLORS[row][0]}" for row in range(4, 8)]
    assert shards[2].positions.tolist() == [8, 9, 10]
    if form == "npy":
        array = np.load(tmp_path / "out" / "img_emb" / "img_emb_00001.npy")
        assert np.array_equal(array, shards[1].images)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["unit_norm"] is True


def test_corrupt_samples_are_counted_and_left_out(pictures, tmp_path):
    (pictures / "002.png").write_bytes(b"no picture")
    (pictures / "005.txt").unlink()
    for row in (8, 9, 10):  # a shard without any sample
        (pictures / f"{row:03}.png").write_bytes(b"")
    store = embedded(pictures, tmp_path / "out")
    rows, damage = store.summary()
    assert (rows, damage.total) == (6, 5)
    assert {found.key for found in damage.examples} == {"002", "005", "008", "009", "010"}
    assert [shard.positions.tolist() for shard in store.shards()] == [[0, 1, 3], [4, 6, 7], []]
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of 11 samples could be read: 10 image"):
        embedded(pictures, tmp_path / "other")
    with pytest.raises(UserError, match=r"holds no embedding: all samples were corrupt"):
        list(EmbeddingStore.open(tmp_path / "other").shards())


def killed(step, pictures, out):
    """A child process that is killed before its n-th file takes its name; whether it was."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        return os.WIFSIGNALED(status)
    left = step
    replace = type(out).replace

    def replace_or_die(path, target):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    failed = 1
    try:
        type(out).replace = replace_or_die
        embedded(pictures, out)
        failed = 0
    finally:
        os._exit(failed)


def test_a_killed_process_is_resumed_without_a_duplicate_or_a_gap(pictures, tmp_path):
    (pictures / "003.png").write_bytes(b"no picture")
    complete = content(embedded(pictures, tmp_path / "complete").folder)
    steps = random.Random(0)
    for number in range(3):
        out = tmp_path / f"killed{number}"
        kills = 0
        while killed(steps.randrange(9), pictures, out):
            kills += 1
            assert kills < 100
        assert kills and content(out) == complete


def test_only_the_missing_shards_are_embedded_again(pictures, tmp_path):
    store = embedded(pictures, tmp_path / "out")
    before = content(store.folder)
    towers = CodedTowers()
    embedded(pictures, tmp_path / "out", encoder=towers)
    assert towers.images_seen == 0
    (store.folder / "finished" / "00001.json").write_text("{")
    (store.folder / "text_emb" / "text_emb_00002.npy").unlink()
    assert store.pending() == [1, 2]
    with pytest.raises(UserError, match="2 of 3 shards are missing; repeat the command"):
        list(store.shards())
    embedded(pictures, tmp_path / "out", encoder=towers)
    assert towers.images_seen == 7 and content(store.folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "d" * 64, "model_name": "other"},
            r"another model: coded \(coded\), not other \(coded\)",
        ),
        ({"model": "d" * 64}, "another model: coded .*, with other weights than it has now"),
        (
            {"model": "d" * 64, "preprocessing": {"mean": (0.5, 0.5)}},
            r"another preprocessing: coded \(coded\) with mean \[0.4, 0.5\], not \[0.5, 0.5\] of",
        ),
        ({"source_digest": "x"}, "other data"),
        ({"batch_size": 4}, "other settings \\(--batch-size 2, not 4\\)"),
        (
            {"form": "parquet", "texts": False},
            "other settings \\(--enable-text True, not False; --format npy, not parquet\\)",
        ),
        ({"precision": "amp_bf16"}, "other settings \\(precision fp32, not amp_bf16\\)"),
    ],
)
def test_a_folder_of_something_else(pictures, tmp_path, changes, message):
    store = embedded(pictures, tmp_path / "out")
    before = content(store.folder)
    with pytest.raises(UserError, match=f"holds embeddings of {message}"):
        embedded(pictures, tmp_path / "out", **changes)
    assert content(store.folder) == before


def test_folders_that_are_no_store(pictures, tmp_path):
    with pytest.raises(UserError, match=r"is not empty, and has no manifest\.json"):
        embedded(pictures, pictures)
    with pytest.raises(UserError, match="is not a folder of embeddings"):
        EmbeddingStore.open(pictures)
    store = embedded(pictures, tmp_path / "out")
    manifest = store.folder / embedding_store.MANIFEST
    good = manifest.read_text()
    bad_ones = [
        ('"dim": 64', '"dim": "x"'),
        ("npy", "tar"),
        ('"samples": 11', '"samples": 90000000'),
    ]
    for bad in ("{}", "[", *(good.replace(*change) for change in bad_ones)):
        manifest.write_text(bad)
        with pytest.raises(UserError, match=r"manifest.json is damaged, or of another version"):
            EmbeddingStore.open(store.folder)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_damaged_shards_are_named(pictures, tmp_path, form):
    store = embedded(pictures, tmp_path / "out", form=form)
    name = "img_emb/img_emb_00001.npy" if form == "npy" else "parquet/embeddings_00001.parquet"
    path = store.folder / name
    good = path.read_bytes()
    numbers = random.Random(0)
    for _ in range(20):
        path.write_bytes(good[: numbers.randrange(len(good))])
        with pytest.raises(UserError, match=r"shard 1 is damaged \(.*finished/00001.json"):
            store.read(1)
    if form == "npy":
        np.save(path, np.ones((3, 64), np.float32))
        with pytest.raises(UserError, match="damaged"):
            store.read(1)


def test_a_model_that_has_diverged(pictures, tmp_path):
    class Diverged(CodedTowers):
        def encode_image(self, images):
            return super().encode_image(images) * torch.nan

    with pytest.raises(UserError, match="not finite for 4 of 4 samples"):
        embedded(pictures, tmp_path / "out", encoder=Diverged())
