import numpy as np
import pytest
import torch

from datacomp_sets import CodedTowers, picture
from embedding_folders import embedded
from neuclip.embedding.stored_images import StoredImages


class Towers(CodedTowers):
    """Their tokens also hold how long the text is, as a tokenizer's do."""

    @property
    def tokenize(self):
        numbers = super().tokenize
        return lambda texts: torch.cat(
            [numbers(texts), torch.tensor([[len(text)] for text in texts])], dim=1
        )


# Colors (r, g, b): a text with "number n" is nearest to pictures of a high weight of n.
COLORS = [(1, 2, 3), (4, 5, 6), (2, 1, 3), (7, 8, 9), (1, 5, 9), (3, 2, 1), (10, 11, 12)]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, color in enumerate(COLORS):
        (folder / f"{number}.png").write_bytes(picture(color))
        (folder / f"{number}.txt").write_text(f"colors {color}")
    return folder


@pytest.fixture
def images(pictures, tmp_path):
    """The features of the pictures, in shards of four."""
    store = embedded(pictures, tmp_path / "embeddings", texts=False)
    return StoredImages.open(store)


@pytest.fixture
def towers():
    return Towers()


@pytest.fixture
def exact_features():
    features = np.zeros((len(COLORS), 64))
    for row, color in enumerate(COLORS):
        for number, weight in zip(color, (1.0, 0.6, 0.3), strict=True):
            features[row, number] = weight
    return features / np.linalg.norm(features, axis=1, keepdims=True)
