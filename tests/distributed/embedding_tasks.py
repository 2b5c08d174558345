"""Embeddings for the processes of the pool, which import this module."""

from pathlib import Path

import torch

from datacomp_sets import CodedTowers
from embedding_folders import embedded


def embed(folder: Path, out: Path) -> int:
    """Fills the folder, or the rest of it; the number of images that this rank embedded."""
    torch.set_num_threads(1)
    towers = CodedTowers()
    embedded(folder, out, towers)
    return towers.images_seen
