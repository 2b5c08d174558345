"""Folders of pictures whose features can be read off, and their embedding without a model."""

from datacomp_sets import DIM, CodedTowers, picture
from neuclip.data.opening import open_source
from neuclip.data.sources.source import content_digest
from neuclip.embedding.embedding_store import EmbeddingStore, StoreManifest
from neuclip.embedding.sharded_embedding import fill_store
from neuclip.evaluation.interfaces import EvaluationSettings

COLORS = [
    (1, 2, 3), (4, 5, 6), (2, 1, 3), (7, 8, 9), (1, 5, 9), (3, 2, 1), (10, 11, 12), (1, 2, 3),
    (4, 5, 6), (20, 2, 3), (30, 31, 32),
]  # fmt: skip


def write_pictures(folder, colors):
    """Picture i has the text "number r", of its own first number."""
    folder.mkdir()
    for row, color in enumerate(colors):
        (folder / f"{row:03}.png").write_bytes(picture(color))
        (folder / f"{row:03}.txt").write_text(f"number {color[0]}")
    return folder


def manifest_of(source, **changes):
    settings = {
        "model": "c" * 64, "model_name": "coded", "arch": "coded",
        "preprocessing": {"mean": (0.4, 0.5)},
        "precision": "fp32", "source": "pictures", "source_digest": content_digest(source),
        "samples": len(source), "dim": DIM, "dtype": "float32", "texts": True, "form": "npy",
        "batch_size": 2, "shard_samples": 4,
    }  # fmt: skip
    return StoreManifest(**settings | changes)


def embedded(folder, out, encoder=None, **changes):
    """Embeds a folder of pictures into `out`, or goes on with it."""
    source = open_source(str(folder), captions="required")
    store = EmbeddingStore.begin(out, manifest_of(source, **changes))
    fill_store(store, encoder or CodedTowers(), source, EvaluationSettings(workers=0))
    return store


def content(folder):
    """All files of a folder, hidden ones too, with their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
