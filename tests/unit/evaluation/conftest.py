"""Small stand-ins: an encoder of fixed random projections, and encoded splits made by hand."""

import io
import json
import logging
import tarfile
import zlib

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from neuclip.evaluation.interfaces import EncodedSplit


class ProjectionEncoder:
    """Pictures and words through fixed random matrices; deterministic, and quick."""

    def __init__(self, dim: int = 16, side: int = 8) -> None:
        generator = torch.Generator().manual_seed(5)
        self.image_weights = torch.randn(3 * side * side, dim, generator=generator)
        self.word_vectors = torch.randn(1000, dim, generator=generator)
        self.side = side
        self.images_seen = 0
        self.texts_seen = 0

    device = torch.device("cpu")

    def transform(self, image) -> Tensor:
        small = torch.tensor(list(image.resize((self.side, self.side)).tobytes()))
        return small.float().view(self.side, self.side, 3).permute(2, 0, 1) / 255

    def encode_image(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return normalize(images.flatten(1) @ self.image_weights, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts_seen += len(tokens)
        return normalize(self.word_vectors[tokens].sum(dim=1), dim=-1)

    def tokenize(self, texts: list[str]) -> Tensor:
        words = [[zlib.crc32(word.encode()) % 999 + 1 for word in text.split()] for text in texts]
        return torch.tensor([(row + [0] * 8)[:8] for row in words])


def _make_split(
    image_groups: list[int],
    captions: list[str],
    classes: list[int] | None = None,
    *,
    dim: int = 6,
    seed: int = 0,
    constant: bool = False,
) -> EncodedSplit:
    """Random features, equal within a group of images and for equal captions."""
    generator = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(captions))
    text_groups = torch.tensor([names.index(caption) for caption in captions])
    groups = torch.tensor(image_groups)
    images = normalize(torch.randn(int(groups.max()) + 1, dim, generator=generator), dim=-1)
    texts = normalize(torch.randn(len(names), dim, generator=generator), dim=-1)
    if constant:
        images, texts = (torch.eye(dim)[:1].repeat(len(x), 1) for x in (images, texts))
    return EncodedSplit(
        image_features=images[groups],
        text_features=texts[text_groups],
        sample_ids=torch.arange(len(captions)),
        class_indices=torch.tensor(classes or [-1] * len(captions)),
        captions=captions,
        keys=[f"key{position}" for position in range(len(captions))],
        image_groups=groups,
        text_groups=text_groups,
    )


@pytest.fixture
def log(caplog):
    """What the package logs, whether or not its messages go to the root logger."""
    logger = logging.getLogger("neuclip")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def encoder() -> ProjectionEncoder:
    return ProjectionEncoder()


@pytest.fixture
def make_split():
    return _make_split


def _write_split(folder, samples, classnames=None, templates=None):
    """Writes one shard of (key, color or bytes, caption, class[, record]); DataComp's files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for key, color, caption, class_index, *records in samples:
            content = color if isinstance(color, bytes) else _png(color)
            parts = {"png": content, "txt": caption.encode()}
            if class_index is not None:
                parts["cls"] = str(class_index).encode()
            for record in records:
                parts["json"] = json.dumps(record).encode()
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    if classnames is not None:
        (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    if templates is not None:
        text = "\n".join(templates) + "\n"
        (folder / "zeroshot_classification_templates.txt").write_text(text)
    return folder


def _png(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def write_split():
    return _write_split


COLORS = [(40 * i, 255 - 30 * i, 17 * i * i % 256) for i in range(6)]


@pytest.fixture
def small_split(tmp_path):
    """Six colors; the first two samples are one image with two names."""
    colors = [COLORS[0], COLORS[0], *COLORS[1:6]]
    names = ["latin a", "greek alpha", "be", "ce", "de", "ef", "ge"]
    samples = [
        (f"{i:03}", color, f"the letter {name}", i)
        for i, (color, name) in enumerate(zip(colors, names, strict=True))
    ]
    return _write_split(tmp_path / "letters", samples, names, ["{c}", "the letter {c}"])
