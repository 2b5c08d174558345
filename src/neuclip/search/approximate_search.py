"""Approximate search with faiss: an index beside the features, and its measured recall.

The index is an inverted file (Jégou et al., "Product quantization for nearest neighbor search",
2011): images are sorted into lists around centroids, and a query looks at the nearest lists. It
holds the features in 8 bits; what it finds is compared again with the features themselves, so
scores are exact and only what lies in other lists is missed. How many lists are looked at is chosen
by the recall on a sample of queries, and another sample measures the recall that is shown.
"""

import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from neuclip.data.progress import Progress
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_texts
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.files import describe, replacing, sha256, write_whole, writing
from neuclip.search.exact_search import ExactSearch, Nearest, NearestSearch, rescored
from neuclip.untrusted import read_file

RECALL_AT = 10
CANDIDATES = 1000
"""Images that the index finds for a query, and that are compared again."""
_WANTED = 0.99  # recall at which no further lists are looked at
_MOST_LOOKED_AT = 8  # at most one list in so many, or a few
_FEW_LISTS = 16
_PER_CENTROID = 40  # images in the training sample; faiss warns below 39
_QUERIES = 200  # of each kind, in each half
_BATCH = 64  # texts per forward pass
_INDEX, _RECORD = "index.faiss", "index.json"


class IndexRecord(BaseModel):
    """What an index is of, and how well it finds.

    Attributes:
        version: of the files.
        features: digest of the features; see `StoredImages.digest`.
        file: SHA-256 of the file of the index.
        lists: number of lists.
        probes: lists that a query looks at.
        recall: share of the 10 nearest images that are found, by kind of query: `texts` are
            captions, `images` are images of the data, without themselves.
        queries: number of queries that it is measured on, by kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    features: str
    file: str
    lists: int = Field(ge=1)
    probes: int = Field(ge=1)
    recall: dict[str, float]
    queries: dict[str, int]

    @property
    def described(self) -> str:
        """The recall in a few words."""
        kinds = (f"{self.recall[kind]:.3f} for {kind}" for kind in self.recall)
        return f"recall@{RECALL_AT} {', '.join(kinds)}"


@dataclass(frozen=True)
class SampleQueries:
    """Queries to measure recall on.

    Attributes:
        kind: `texts` or `images`.
        vectors: [queries, dim] unit-norm features.
        own: [queries] row of each query's image, which does not count as found; none for texts.
    """

    kind: str
    vectors: Float[Tensor, "queries dim"]
    own: Int64[np.ndarray, " queries"] | None = None

    def half(self, start: int) -> "SampleQueries":
        """Every other query from the first or the second one on."""
        own = None if self.own is None else self.own[start::2]
        return SampleQueries(self.kind, self.vectors[start::2], own)


@dataclass(frozen=True)
class ApproximateSearch:
    """Looks at the lists near a query, and compares what they hold exactly.

    Attributes:
        images: the images.
        record: what the index is of.
    """

    images: StoredImages
    record: IndexRecord
    _index: Any = field(repr=False)

    @classmethod
    def open(cls, folder: Path, images: StoredImages) -> "ApproximateSearch | None":
        """The index in a folder; None if there is none.

        Raises:
            UserError: it is of other features, or damaged, or faiss is missing.
        """
        path = folder / _RECORD
        again = f"remove {folder}, and the next search with --index builds it again"
        try:
            record = IndexRecord.model_validate_json(read_file(path, 2**20))
            if record.features != images.digest:
                raise UserError(
                    f"{folder} is an index of other features ({record.features[:12]}) than those "
                    f"beside it ({images.digest[:12]}): {again}"
                )
            if sha256(folder / _INDEX) != record.file:
                raise UserError(f"{folder / _INDEX} is damaged (another sum): {again}")
            index = _faiss().read_index(str(folder / _INDEX))
        except FileNotFoundError:
            if path.exists():
                raise UserError(f"{folder} has no {_INDEX}: {again}") from None
            return None
        except (OSError, ValidationError, RuntimeError) as error:
            raise UserError(f"{folder} is damaged ({describe(error)}): {again}") from None
        index.nprobe = record.probes
        return cls(images, record, index)

    @classmethod
    def build(
        cls,
        folder: Path,
        images: StoredImages,
        samples: list[SampleQueries],
        progress: Progress | None = None,
    ) -> "ApproximateSearch":
        """Builds an index, chooses how many lists a query looks at, and measures the recall.

        Args:
            folder: the folder to write.
            images: the images.
            samples: queries of several kinds.
            progress: called with the steps done.

        Raises:
            UserError: faiss is missing, or the folder cannot be written.
        """
        index = _filled(images, progress)
        choice = [sample.half(0) for sample in samples]
        measured = [sample.half(1) for sample in samples]
        begun = IndexRecord(
            features="", file="", lists=index.nlist, probes=1, recall={}, queries={}
        )
        search = cls(images, begun, index)
        exact = ExactSearch(images)
        right = [_found(exact, sample) for sample in choice]
        most = max(index.nlist // _MOST_LOOKED_AT, min(index.nlist, _FEW_LISTS))
        while 2 * index.nprobe <= most and min(map(search.recall, choice, right)) < _WANTED:
            index.nprobe *= 2
        recall = {each.kind: search.recall(each, _found(exact, each)) for each in measured}
        path = folder / _INDEX
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                try:
                    _faiss().write_index(index, file.name)
                except RuntimeError as error:
                    raise UserError(f"cannot write {path}: {describe(error)}") from None
        record = begun.model_copy(
            update={
                "features": images.digest,
                "file": sha256(path),
                "probes": index.nprobe,
                "recall": {kind: round(value, 4) for kind, value in recall.items()},
                "queries": {each.kind: len(each.vectors) for each in measured},
            }
        )
        write_whole(folder / _RECORD, record.model_dump_json(indent=1) + "\n")
        return cls(images, record, index)

    def nearest(self, query: Float[Tensor, " dim"], number: int) -> Nearest:
        """The best of what the index finds: at most `CANDIDATES`.

        Args:
            query: float32, on the CPU.
            number: number of images.

        Raises:
            UserError: a file of the features was cut.
        """
        _, rows = self._index.search(query.numpy()[None], min(CANDIDATES, len(self.images)))
        found = np.sort(rows[0][rows[0] >= 0])
        return rescored(self.images, query, found, number)

    def recall(self, sample: SampleQueries, right: list[set[int]]) -> float:
        """Share of the right images that are found.

        Args:
            sample: the queries.
            right: rows of the nearest images of each query.
        """
        both = sum(map(len, map(set.__and__, _found(self, sample), right)))
        return both / max(1, sum(map(len, right)))


def _found(search: NearestSearch, sample: SampleQueries) -> list[set[int]]:
    """The nearest rows of each query, without its own."""
    own = [None] * len(sample.vectors) if sample.own is None else sample.own.tolist()
    found: list[set[int]] = []
    for vector, row in zip(sample.vectors, own, strict=True):
        best = search.nearest(vector, RECALL_AT + (row is not None)).rows.tolist()
        found.append({each for each in best if each != row} if row in best else {*best[:RECALL_AT]})
    return found


def _filled(images: StoredImages, progress: Progress | None) -> Any:  # noqa: ANN401
    """An index of all images."""
    lists = max(1, min(int(4 * len(images) ** 0.5), len(images) // _PER_CENTROID))
    drawn = np.random.default_rng(0).choice(
        len(images), min(len(images), _PER_CENTROID * lists), replace=False
    )
    faiss = _faiss()
    index = faiss.index_factory(images.dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # for few images it warns otherwise
    steps = 1 + len(images.parts)
    if progress is not None:
        progress("building the index", 0, steps)
    index.train(images.features(np.sort(drawn)))
    for done, (_, rows) in enumerate(images.blocks(), start=1):
        if len(rows):
            index.add(rows.astype(np.float32))
        if progress is not None:
            progress("building the index", done + 1, steps)
    return index


def sample_queries(
    encoder: ImageTextEncoder, images: StoredImages, numbers: np.random.Generator
) -> list[SampleQueries]:
    """Captions and images of the data as queries, as far as there are captions.

    Args:
        encoder: the towers.
        images: the images.
        numbers: draws them.
    """
    drawn = np.sort(numbers.choice(len(images), min(len(images), 2 * _QUERIES), replace=False))
    captions = [images.captions[row] for row in drawn.tolist()]
    texts = sorted({caption for caption in captions if caption.strip()})
    own = SampleQueries("images", torch.from_numpy(images.features(drawn)), drawn)
    if len(texts) < 2:
        return [own]
    return [SampleQueries("texts", encode_texts(encoder, texts, _BATCH).cpu()), own]


def _faiss() -> Any:  # noqa: ANN401
    """The library.

    Raises:
        UserError: it is missing.
    """
    if sys.platform == "darwin":
        # torch and faiss bring an OpenMP of their own each, and the second one ends the process
        # (facebookresearch/faiss#2482). With one thread, faiss starts none of its own.
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            f"--index needs faiss, which cannot be imported ({error}): pip install 'neuclip[index]'"
        ) from None
    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss
