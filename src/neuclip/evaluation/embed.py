"""The towers over a split, once; every judge reads the result."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.data.loader import Batch
from neuclip.data.samples import Damage
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import EncodedImages, EncodedSplit, ImageTextEncoder


def encode_split(
    encoder: ImageTextEncoder, batches: Iterable[Batch], *, allow_damage: bool = False
) -> EncodedSplit:
    """Runs both towers over all batches.

    Pictures count as identical when what the tower sees of them, the transformed tensor, is
    identical in every byte.

    Args:
        encoder: The towers.
        batches: The split in order.
        allow_damage: Judge what is left of a split with damaged samples.

    Raises:
        UserError: the split is damaged (names shard and key), is empty, or a feature is not finite.
    """
    texts: list[Tensor] = []
    fingerprints: list[bytes] = []

    def also(batch: Batch) -> None:
        texts.append(encoder.encode_text(batch.tokens))
        # After the towers: on a GPU they work while this computes.
        fingerprints.extend(_fingerprint(image) for image in batch.images)

    images = encode_images(encoder, batches, allow_damage=allow_damage, also=also)
    return EncodedSplit(
        **{field.name: getattr(images, field.name) for field in fields(images)},
        text_features=_finite(torch.cat(texts), "text", images.keys),
        image_groups=_number(fingerprints),
        text_groups=_number(images.captions),
    )


def encode_images(
    encoder: ImageTextEncoder,
    batches: Iterable[Batch],
    *,
    allow_damage: bool = False,
    also: Callable[[Batch], None] | None = None,
) -> EncodedImages:
    """Runs the image tower over all batches.

    Args:
        encoder: The towers.
        batches: The split in order.
        allow_damage: Judge what is left of a split with damaged samples.
        also: What else to do with each batch, without gradient.

    Raises:
        UserError: the split is damaged (counts, and names shard and key), is empty, or a feature is
            not finite.
    """
    images: list[Tensor] = []
    sample_ids: list[Tensor] = []
    classes: list[Tensor] = []
    captions: list[str] = []
    keys: list[str] = []
    metadata: list[bytes | None] = []
    damage: list[Damage] = []
    for batch in batches:
        damage += batch.damage
        if len(batch.images) == 0 or (damage and not allow_damage):
            continue  # of a damaged split the rest is read only to count
        with torch.no_grad():
            images.append(encoder.encode_image(batch.images))
            if also is not None:
                also(batch)
        sample_ids.append(batch.sample_ids)
        classes.append(batch.class_indices)
        captions += batch.captions
        keys += batch.keys
        metadata += batch.metadata
    if not allow_damage:
        require_whole(damage)
    if not images:
        raise UserError("the evaluation split is empty: no sample could be read")
    return EncodedImages(
        image_features=_finite(torch.cat(images), "image", keys),
        sample_ids=torch.cat(sample_ids),
        class_indices=torch.cat(classes),
        captions=captions,
        keys=keys,
        metadata=metadata,
        damage=tuple(damage),
    )


def encode_texts(
    encoder: ImageTextEncoder, texts: list[str], batch_size: int
) -> Float[Tensor, "texts dim"]:
    """Unit-norm features of texts.

    Raises:
        UserError: a feature is not finite.
    """
    features: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        with torch.no_grad():
            tokens = encoder.tokenize(texts[start : start + batch_size])
            features.append(encoder.encode_text(tokens))
    return _finite(torch.cat(features), "text", texts)


def require_whole(damage: Sequence[Damage]) -> None:
    """Refuses damaged data: numbers from part of a benchmark are not the benchmark's.

    Raises:
        UserError: names shard and key of the first damage.
    """
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise UserError(
            f"an evaluation split must be whole: {damage[0]}{more}; mend or remove the sample"
        )


def _fingerprint(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()


def _number(values: Iterable[Hashable]) -> Int64[Tensor, " samples"]:
    """Equal values get equal numbers, from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _finite(
    features: Float[Tensor, "samples dim"], side: str, keys: list[str]
) -> Float[Tensor, "samples dim"]:
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"the {side} tower gives features that are not finite for {len(bad)} of {len(keys)} "
            f"samples (first: {keys[int(bad[0])]!r}): the model has diverged or its weights are "
            "damaged"
        )
    return features
