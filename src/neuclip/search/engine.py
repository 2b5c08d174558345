"""Finds the images nearest to a query, page by page, and shows them."""

import io
import threading
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from neuclip.data.decode import ImageDecoder
from neuclip.data.samples import SampleError
from neuclip.data.sources.source import Source
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.search.caption_filter import CaptionFilter
from neuclip.search.exact_search import ExactSearch, Nearest, NearestSearch
from neuclip.search.query_vector import QueryVectors, SearchQuery

DEEPEST = 1000
"""Images that a query can reach, over all pages."""


@dataclass(frozen=True)
class Hit:
    """A retrieved image.

    Attributes:
        position: position in the source.
        score: cosine similarity with the query.
        caption: first caption of the image; empty if it has none.
        key: sample key in the source.
    """

    position: int
    score: float
    caption: str
    key: str


@dataclass(frozen=True)
class Found:
    """A page of the answer to a query.

    Attributes:
        hits: retrieved images, best first.
        total: number of images on all pages.
        note: caveat for the user; empty if there is none.
    """

    hits: list[Hit]
    total: int
    note: str = ""


class Engine:
    """Answers queries. A source is not thread-safe: a lock guards it.

    One image is decoded at a time, which bounds the memory.

    Args:
        encoder: the towers.
        source: the images.
        images: their features, keys and captions.
        index: finds the nearest images approximately; if none, the search is exact.
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        source: Source,
        images: StoredImages,
        index: NearestSearch | None = None,
    ) -> None:
        self.images = images
        self._source, self._index = source, index
        self._exact, self._captions = ExactSearch(images), CaptionFilter(images.captions)
        self._decoding = threading.Lock()
        self._vectors = QueryVectors(encoder, images, self._decoding)

    def add_picture(self, content: bytes) -> str:
        """Keeps an uploaded picture to search with, and returns its name.

        Raises:
            UserError: the file is not a readable image.
        """
        return self._vectors.add(content)

    def search(self, query: SearchQuery, number: int, start: int = 0) -> Found:
        """A page of the images nearest to a query, without the images that it names.

        Args:
            query: what to look for.
            number: number of images on the page.
            start: number of better images, on earlier pages.

        Raises:
            UserError: the query has nothing to look for, or names what is not there.
        """
        vector, cut = self._vectors(query)
        # The same images for all pages, so that no image is on two.
        found = self._nearest(vector, query.caption, DEEPEST + len(query.like))
        named = np.isin(self.images.positions[found.rows], query.like)
        rows, scores = found.rows[~named][:DEEPEST], found.scores[~named][:DEEPEST]
        page = slice(start, start + number)
        pairs = zip(rows[page].tolist(), scores[page].tolist(), strict=True)
        hits = [self._hit(row, score) for row, score in pairs]
        note = "A text exceeds the model's context length: its end is ignored." * cut
        return Found(hits, len(rows), note)

    def _nearest(self, vector: Float[Tensor, " dim"], caption: str, number: int) -> Nearest:
        if caption.strip():
            return self._exact.nearest(vector, number, self._captions.rows(caption))
        return (self._index or self._exact).nearest(vector, number)

    def _hit(self, row: int, score: float) -> Hit:
        images = self.images
        return Hit(int(images.positions[row]), score, images.captions[row], images.keys[row])

    def thumbnail(self, position: int, side: int) -> bytes:
        """An image as PNG, at most `side` pixels wide and high.

        Raises:
            UserError: the source has no such image, or it is no longer readable.
        """
        if self.images.row_of(position) is None:
            raise UserError(f"There is no image {position}.")
        try:
            with self._decoding:
                image = self._source.read_with(position, ImageDecoder(smallest=side)).image
                image.thumbnail((side, side), Image.Resampling.LANCZOS)
        except SampleError as error:
            raise UserError(f"The image is no longer readable: {error}") from None
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
