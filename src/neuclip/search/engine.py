"""What is nearest to a text, to a picture of one's own, or to one of the pictures."""

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
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.search.embeddings import Embeddings

_ROWS_AT_ONCE = 2**16  # features in float32 at a time


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        position: Where it is in the source.
        score: Cosine with the query.
        caption: Its caption.
        key: Its name in the source.
    """

    position: int
    score: float
    caption: str
    key: str


@dataclass(frozen=True)
class Found:
    """What a query found.

    Attributes:
        hits: Best first.
        note: What to know about the answer; empty if nothing.
    """

    hits: list[Hit]
    note: str = ""


class Engine:
    """Answers queries, one at a time: towers and sources are no place for several threads.

    Args:
        encoder: The towers.
        source: The pictures.
        embeddings: Their features.
    """

    def __init__(self, encoder: ImageTextEncoder, source: Source, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        self._encoder, self._source = encoder, source
        self._lock = threading.Lock()

    def by_text(self, text: str, number: int) -> Found:
        """Pictures nearest to a text.

        Raises:
            UserError: the text is empty.
        """
        text = text.strip()
        if not text:
            raise UserError("Type what to look for: a few words that describe a picture.")
        with self._lock:
            tokens = self._encoder.tokenize([text, f"{text} x"])
            # Where one more word makes no difference, the text fills all places there are.
            cut = bool((tokens[0] == tokens[1]).all())
            query = self._encoder.encode_text(tokens[:1])
            hits = self._nearest(query[0], number)
        return Found(hits, "The text is longer than the model reads: its end is left out." * cut)

    def by_picture(self, content: bytes, number: int) -> Found:
        """Pictures nearest to the one in an image file.

        Raises:
            UserError: it is no picture that can be read.
        """
        if not content:
            raise UserError("The picture is empty: choose an image file.")
        picture = decode_upload(content)
        with self._lock:
            images = self._encoder.transform(picture).unsqueeze(0)
            return Found(self._nearest(self._encoder.encode_image(images)[0], number))

    def like(self, position: int, number: int) -> Found:
        """Pictures nearest to one of the pictures, itself left out.

        Raises:
            UserError: there is no such picture.
        """
        row = self.embeddings.row_of(position)
        if row is None:
            raise UserError(f"There is no picture {position} here.")
        query = torch.from_numpy(self.embeddings.features[row].astype(np.float32))
        with self._lock:
            hits = self._nearest(query, number + 1)
        return Found([hit for hit in hits if hit.position != position][:number])

    def thumbnail(self, position: int, side: int) -> bytes:
        """A picture as PNG, made smaller where it is larger than `side` pixels.

        Raises:
            UserError: there is no such picture, or it cannot be read any more.
        """
        if self.embeddings.row_of(position) is None:
            raise UserError(f"There is no picture {position} here.")
        try:
            with self._lock:
                sample = self._source.read_with(position, ImageDecoder(smallest=side))
        except SampleError as error:
            raise UserError(f"The picture cannot be read any more: {error}") from None
        picture = sample.image
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()

    def _nearest(self, query: Float[Tensor, " dim"], number: int) -> list[Hit]:
        values, rows = torch.empty(0), torch.empty(0, dtype=torch.int64)
        query = query.to("cpu")
        features = self.embeddings.features
        for start in range(0, len(features), _ROWS_AT_ONCE):
            block = torch.from_numpy(features[start : start + _ROWS_AT_ONCE].astype(np.float32))
            values = torch.cat([values, block @ query])
            rows = torch.cat([rows, torch.arange(start, start + len(block))])
            best = values.topk(min(number, len(values)))
            values, rows = best.values, rows[best.indices]
        places = self.embeddings.positions[rows.numpy()].tolist()
        return [self._hit(*pair) for pair in zip(places, values.tolist(), strict=True)]

    def _hit(self, position: int, score: float) -> Hit:
        try:
            content = self._source.content(position)
        except SampleError as error:  # the data changed while the page was open
            return Hit(position, score, "(cannot be read any more)", error.damage.key)
        return Hit(position, score, content.caption, content.key)
