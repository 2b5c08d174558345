"""The towers as evaluation, search and export use them."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.model.clip import Clip, Tokenize, Transform


class Encoder:
    """Encodes images and texts as unit-norm float32 embeddings, without gradient.

    Args:
        clip: the model.
        device: where it is; inputs are moved there.
    """

    def __init__(self, clip: Clip, device: torch.device) -> None:
        self._clip = clip
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where the towers and the embeddings are."""
        return self._device

    @property
    def transform(self) -> Transform:
        """The transform of evaluation images."""
        return self._clip.eval_transform

    @property
    def tokenize(self) -> Tokenize:
        """Texts to tokens [texts, length]. A plain function, cheap to pickle."""
        return self._clip.tokenize

    @torch.no_grad()
    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings of transformed images."""
        images = images.to(self._device, self._clip.input_dtype, non_blocking=True)
        return self._encode(self._clip.towers.encode_image, images)

    @torch.no_grad()
    def encode_text(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of tokens."""
        return self._encode(self._clip.towers.encode_text, tokens.to(self._device))

    def _encode(self, tower: object, inputs: Tensor) -> Tensor:
        encode = cast(Callable[[Tensor], Tensor], tower)
        was_training = self._clip.towers.training
        self._clip.towers.eval()
        try:
            with self._clip.autocast(self._device):
                features = encode(inputs)
        finally:
            self._clip.towers.train(was_training)
        return nn.functional.normalize(features.float(), dim=-1)
