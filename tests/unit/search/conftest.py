import numpy as np
import pytest
import torch

from datacomp_sets import CodedTowers, picture
from neuclip.data.opening import open_source
from neuclip.search.embeddings import EmbedSettings, embed_source


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
def embed(tmp_path):
    """Embeds a folder of pictures, and says how many pictures the tower has seen for it."""

    def run(folder, checkpoint="c" * 64, encoder=None, captions="required"):
        encoder = encoder or CodedTowers()
        settings = EmbedSettings(tmp_path / "cache", batch_size=2, workers=0)
        source = open_source(str(folder), captions=captions)
        found = embed_source(encoder, checkpoint, source, settings)
        return found, encoder.images_seen

    return run


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
