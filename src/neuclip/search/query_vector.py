"""Queries: words, words to avoid, and pictures; and the vector that each stands for."""

import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuclip.data.decode import ImageDecoder, decode_upload
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import ImageTextEncoder

LONGEST_TEXT = 10_000  # characters
MOST_PICTURES = 8  # of a query
MOST_AVOIDED = 8  # words or phrases
_KEPT = 256  # vectors of uploaded pictures

_AVOIDED = re.compile(r'(?<!\S)-(?:"([^"]*)"|(\S+))')
_UPLOAD = ImageDecoder(max_pixels=48_000_000, max_memory=384_000_000)


@dataclass(frozen=True)
class SearchQuery:
    """What to look for.

    Attributes:
        text: words; `-word` and `-"several words"` are to be avoided.
        pictures: names of uploaded pictures, as `QueryVectors.add` returns them.
        like: positions of images in the source.
        caption: images whose caption lacks these characters are left out; case does not count.
    """

    text: str = ""
    pictures: tuple[str, ...] = ()
    like: tuple[int, ...] = ()
    caption: str = ""


def split_text(text: str) -> tuple[str, list[str]]:
    """The words to look for, and the words or phrases to avoid.

    A minus sign counts at the start of a word only, so `t-shirt` is one word.

    Raises:
        UserError: the text is too long, or too many words are to be avoided.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"The text has more than {LONGEST_TEXT:,} characters.")
    avoided = [(quoted or word).strip() for quoted, word in _AVOIDED.findall(text)]
    avoided = [each for each in avoided if each]
    if len(avoided) > MOST_AVOIDED:
        raise UserError(f"At most {MOST_AVOIDED} words or phrases can be avoided (-word).")
    return " ".join(_AVOIDED.sub(" ", text).split()), avoided


def combined(
    wanted: Float[Tensor, "wanted dim"], avoided: Float[Tensor, "avoided dim"]
) -> Float[Tensor, " dim"]:
    """The unit vector of a query.

    It is the mean of what is wanted; plus, if anything is to be avoided, that mean less the mean of
    what is to be avoided, as Qdrant's `average_vector` recommends. What is wanted counts twice, so
    an image that only lacks what is to be avoided does not come first.

    Args:
        wanted: unit vectors.
        avoided: unit vectors.
    """
    if len(wanted) == 1 and not len(avoided):
        return wanted[0]
    mean = wanted.mean(dim=0)
    found = 2 * mean - avoided.mean(dim=0) if len(avoided) else mean
    return torch.nn.functional.normalize(found, dim=0)


class QueryVectors:
    """Turns queries into vectors. The towers are not thread-safe: a lock guards them.

    The vectors of the latest pictures are kept, which bounds the memory.

    Args:
        encoder: the towers.
        images: the images of the source.
        decoding: is held while a picture is decoded.
    """

    def __init__(
        self, encoder: ImageTextEncoder, images: StoredImages, decoding: threading.Lock
    ) -> None:
        self._encoder, self._images = encoder, images
        self._towers, self._decoding = threading.Lock(), decoding
        self._pictures: OrderedDict[str, Float[Tensor, " dim"]] = OrderedDict()

    def add(self, content: bytes) -> str:
        """Embeds an uploaded picture, and returns the name that queries call it by.

        Raises:
            UserError: the file is not a readable image.
        """
        if not content:
            raise UserError("The file is empty: choose an image file.")
        with self._decoding:
            pixels = self._encoder.transform(decode_upload(content, _UPLOAD)).unsqueeze(0)
        with self._towers, torch.no_grad():
            vector = self._encoder.encode_image(pixels)[0].to("cpu")
            name = hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:32]
            self._pictures[name] = vector
            self._pictures.move_to_end(name)
            while len(self._pictures) > _KEPT:
                self._pictures.popitem(last=False)
        return name

    def __call__(self, query: SearchQuery) -> tuple[Float[Tensor, " dim"], bool]:
        """The unit vector of a query, and whether the end of a text exceeds the model's context.

        Raises:
            UserError: the query has nothing to look for, or names a picture that is not there.
        """
        text, avoided = split_text(query.text)
        wanted = self._of_pictures(query)
        if not text and not len(wanted):
            missing = "Words after a minus sign are only avoided: type also what to look for."
            raise UserError(missing if avoided else "Type a few words that describe an image.")
        vectors, cut = self._of_texts([text] * bool(text) + avoided)
        of_text, of_avoided = vectors.split([int(bool(text)), len(avoided)])
        return combined(torch.cat([of_text, wanted]), of_avoided), cut

    def _of_pictures(self, query: SearchQuery) -> Float[Tensor, "pictures dim"]:
        if len(query.pictures) + len(query.like) > MOST_PICTURES:
            raise UserError(f"A query takes at most {MOST_PICTURES} pictures.")
        rows = [self._images.row_of(position) for position in query.like]
        for position, row in zip(query.like, rows, strict=True):
            if row is None:
                raise UserError(f"There is no image {position}.")
        with self._towers:
            kept = [self._pictures.get(name) for name in query.pictures]
        found = [vector for vector in kept if vector is not None]
        if len(found) < len(kept):
            raise UserError("An uploaded picture is no longer kept: choose it again.")
        own = [self._images.features(np.array([row], np.int64))[0] for row in rows]
        return torch.stack([*found, *map(torch.from_numpy, own)]) if found or own else self._none()

    def _of_texts(self, texts: list[str]) -> tuple[Float[Tensor, "texts dim"], bool]:
        if not texts:
            return self._none(), False
        with self._towers, torch.no_grad():
            tokens = self._encoder.tokenize(texts)
            # If another word does not change the tokens, the text fills the context.
            longer = self._encoder.tokenize([f"{text} x" for text in texts])
            vectors = self._encoder.encode_text(tokens).to("cpu")
        return vectors, bool((tokens == longer).flatten(1).all(dim=1).any())

    def _none(self) -> Float[Tensor, "0 dim"]:
        return torch.empty(0, self._images.dim)
