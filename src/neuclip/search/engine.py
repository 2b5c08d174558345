"""Finds the images nearest to a text, to an uploaded image, or to an image of the source."""

import io
import threading
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from neuclip.data.decode import ImageDecoder, decode_upload
from neuclip.data.samples import SampleError
from neuclip.data.sources.source import Source
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.search.exact_search import ExactSearch

_UPLOAD = ImageDecoder(max_pixels=48_000_000, max_memory=384_000_000)


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
    """The answer to a query.

    Attributes:
        hits: retrieved images, best first.
        note: caveat for the user; empty if there is none.
    """

    hits: list[Hit]
    note: str = ""


class Engine:
    """Answers queries. Towers and sources are not thread-safe: a lock guards each.

    One image is decoded at a time, which bounds the memory.

    Args:
        encoder: the towers.
        source: the images.
        images: their features, keys and captions.
    """

    def __init__(self, encoder: ImageTextEncoder, source: Source, images: StoredImages) -> None:
        self.images = images
        self._encoder, self._source = encoder, source
        self._search = ExactSearch(images)
        self._towers = threading.Lock()
        self._reading = threading.Lock()

    def by_text(self, text: str, number: int) -> Found:
        """Images nearest to a text.

        Raises:
            UserError: the text is empty.
        """
        text = text.strip()
        if not text:
            raise UserError("Type a few words that describe an image.")
        with self._towers:
            tokens = self._encoder.tokenize([text, f"{text} x"])
            # If another word does not change the tokens, the text fills the context.
            cut = bool((tokens[0] == tokens[1]).all())
            query = self._encoder.encode_text(tokens[:1])
        hits = self._nearest(query[0], number)
        return Found(hits, "The text exceeds the model's context length: its end is ignored." * cut)

    def by_image(self, content: bytes, number: int) -> Found:
        """Images nearest to an uploaded image file.

        Raises:
            UserError: the file is not a readable image.
        """
        if not content:
            raise UserError("The file is empty: choose an image file.")
        with self._reading:
            image = decode_upload(content, _UPLOAD)
            images = self._encoder.transform(image).unsqueeze(0)
        with self._towers:
            query = self._encoder.encode_image(images)
        return Found(self._nearest(query[0], number))

    def like(self, position: int, number: int) -> Found:
        """Images nearest to an image of the source, without the image itself.

        Raises:
            UserError: the source has no such image.
        """
        row = self.images.row_of(position)
        if row is None:
            raise UserError(f"There is no image {position}.")
        query = torch.from_numpy(self.images.features(np.array([row])))
        hits = self._nearest(query[0], number + 1)
        return Found([hit for hit in hits if hit.position != position][:number])

    def thumbnail(self, position: int, side: int) -> bytes:
        """An image as PNG, at most `side` pixels wide and high.

        Raises:
            UserError: the source has no such image, or it is no longer readable.
        """
        if self.images.row_of(position) is None:
            raise UserError(f"There is no image {position}.")
        try:
            with self._reading:
                image = self._source.read_with(position, ImageDecoder(smallest=side)).image
                image.thumbnail((side, side), Image.Resampling.LANCZOS)
        except SampleError as error:
            raise UserError(f"The image is no longer readable: {error}") from None
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    def _nearest(self, query: Float[Tensor, " dim"], number: int) -> list[Hit]:
        found = self._search.nearest(query.to("cpu"), number)
        images = self.images
        return [
            Hit(int(images.positions[row]), score, images.captions[row], images.keys[row])
            for row, score in zip(found.rows.tolist(), found.scores.tolist(), strict=True)
        ]
