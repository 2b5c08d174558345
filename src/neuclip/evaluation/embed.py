"""Runs the towers over a split, once for all metrics.

The ranks share full batches, cut as a single rank would cut them, and all-gather the features.
Every rank then holds the features of a single-rank run, to the last bit, and computes the same
metrics.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from neuclip.data.batch import Batch, Unreadable
from neuclip.data.loader import LoaderSettings, evaluation_loader, evaluation_requests
from neuclip.data.samples import Damage
from neuclip.data.sources.source import Source
from neuclip.data.truncation import count_truncated
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import (
    EncodedImages,
    EncodedSplit,
    EvaluationSettings,
    ImageTextEncoder,
)
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import share_out


def start_reading(
    encoder: ImageTextEncoder,
    source: Source,
    settings: EvaluationSettings,
    positions: NDArray[np.int64] | None = None,
    title: str | None = None,
) -> Iterator[Batch | Unreadable]:
    """Starts to read this rank's share of a split: full batches, cut as a single rank cuts them.

    Each sample comes with all its captions.

    Args:
        encoder: has the transform and the tokenizer.
        source: the split.
        settings: pairs per batch, data workers, and how long to wait for them.
        positions: samples to read; if none, all.
        title: name of the split, to report progress; none: report nothing.
    """
    if positions is None:
        positions = np.arange(len(source), dtype=np.int64)
    requests = evaluation_requests(positions, settings.batch_size, "all")
    share = collectives.owned_slice(len(requests))
    mine = requests[share.start : share.stop]
    on_gpu = encoder.device.type == "cuda"  # pinned memory is copied there asynchronously
    reading = LoaderSettings(
        settings.batch_size,
        workers=settings.workers,
        pin_memory=on_gpu,
        stall_limit=settings.stall_limit,
    )
    batches = evaluation_loader(source, encoder.transform, encoder.tokenize, mine, reading)
    progress = None if title is None else settings.reporting(title)
    return batches if progress is None else _reported(batches, len(mine), progress)


def _reported(
    batches: Iterator[Batch | Unreadable], total: int, progress: Callable[[int, int], None]
) -> Iterator[Batch | Unreadable]:
    for done, batch in enumerate(batches):
        progress(done, total)
        yield batch


def encode_split(
    encoder: ImageTextEncoder,
    batches: Iterable[Batch | Unreadable],
    *,
    allow_damage: bool = False,
) -> EncodedSplit:
    """The images of a split with their captions; see `encode_both`.

    Raises:
        UserError: besides the errors of `encode_both`, no sample has a caption.
    """
    _, pairs = encode_both(encoder, batches, allow_damage=allow_damage)
    if pairs is None:
        raise UserError("the evaluation set has no captions")
    return pairs


def encode_both(
    encoder: ImageTextEncoder,
    batches: Iterable[Batch | Unreadable],
    *,
    allow_damage: bool = False,
    distinct: bool = True,
) -> tuple[EncodedImages, EncodedSplit | None]:
    """Runs both towers over all batches.

    Args:
        encoder: the towers.
        batches: this rank's share of the split, from `start_reading`.
        allow_damage: encode the readable samples of a corrupt split.
        distinct: group identical images (whose transformed tensors are, byte for byte) and equal
            captions; otherwise each is a group of its own.

    Returns:
        The full split, in order, on every rank: its images, and its captions with their images;
        none if no sample has a caption.

    Raises:
        UserError: the split is corrupt (names shard and key) or empty, or a feature is not finite.
    """
    part = _encode(encoder, batches, allow_damage=allow_damage, with_texts=True)
    groups = _number(part.fingerprints) if distinct else None
    images = _assembled(encoder, part, groups)
    if not part.texts:
        return images, None
    owner = torch.tensor(
        [row for row, captions in enumerate(part.captions) for _ in captions], dtype=torch.int64
    )
    captions = [caption for of_sample in part.captions for caption in of_sample]
    keys = [images.keys[row] for row in owner.tolist()]
    return images, EncodedSplit(
        image_features=images.image_features[owner.to(encoder.device)],
        text_features=require_finite(_joined(encoder, part.texts), "text", keys),
        sample_ids=images.sample_ids[owner],
        class_indices=images.class_indices[owner],
        captions=captions,
        keys=keys,
        image_groups=images.image_groups[owner],
        text_groups=_number(captions) if distinct else torch.arange(len(captions)),
    )


def encode_images(
    encoder: ImageTextEncoder,
    batches: Iterable[Batch | Unreadable],
    *,
    allow_damage: bool = False,
) -> EncodedImages:
    """Runs the image tower over all batches; otherwise as `encode_both` without groups.

    Args:
        encoder: the towers.
        batches: this rank's share of the split, from `start_reading`.
        allow_damage: encode the readable samples of a corrupt split.

    Raises:
        UserError: the split is corrupt (names shard and key) or empty, or a feature is not finite.
    """
    part = _encode(encoder, batches, allow_damage=allow_damage, with_texts=False)
    return _assembled(encoder, part)


def encode_texts(
    encoder: ImageTextEncoder, texts: list[str], batch_size: int
) -> Float[Tensor, "texts dim"]:
    """Unit-norm features of texts; the ranks share the batches.

    Raises:
        UserError: a feature is not finite.
    """
    starts = range(0, len(texts), batch_size)

    def encode(pieces: range) -> list[Tensor]:
        features: list[Tensor] = []
        for start in starts[pieces.start : pieces.stop]:
            with torch.no_grad():
                tokens = encoder.tokenize(texts[start : start + batch_size])
                features.append(encoder.encode_text(tokens))
        return [torch.cat(features).cpu()] if features else []

    features = _joined(encoder, share_out(len(starts), encode))
    return require_finite(features, "text", texts)


@dataclass
class _Encoded:
    """Encoded batches: features on the CPU by batch, everything else by sample."""

    images: list[Tensor] = field(default_factory=list[Tensor])
    texts: list[Tensor] = field(default_factory=list[Tensor])
    fingerprints: list[bytes] = field(default_factory=list[bytes])
    sample_ids: list[Tensor] = field(default_factory=list[Tensor])
    classes: list[Tensor] = field(default_factory=list[Tensor])
    captions: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    keys: list[str] = field(default_factory=list[str])
    metadata: list[bytes | None] = field(default_factory=list[bytes | None])
    damage: list[Damage] = field(default_factory=list[Damage])
    digests: list[int] = field(default_factory=list[int])
    truncated: list[int] = field(default_factory=list[int])


def _encode(
    encoder: ImageTextEncoder,
    batches: Iterable[Batch | Unreadable],
    *,
    allow_damage: bool,
    with_texts: bool,
) -> _Encoded:
    """Encodes this rank's batches, and returns those of all ranks in order.

    Raises:
        UserError: the split is corrupt; raised on all ranks.
    """
    own = _Encoded()
    for batch in batches:
        own.damage += batch.damage
        if isinstance(batch, Unreadable) or (own.damage and not allow_damage):
            continue  # the rest of a corrupt split is read only to count its corrupt samples
        with torch.no_grad():
            own.images.append(encoder.encode_image(batch.images))
            if with_texts:
                # As many texts as images at a time, however many captions an image has.
                own.texts += [
                    encoder.encode_text(tokens)
                    for tokens in batch.tokens.split(len(batch))
                    if len(tokens)
                ]
                # After the launch of the towers: on a GPU, both run at the same time.
                own.fingerprints.extend(_fingerprint(image) for image in batch.images)
                own.truncated.append(
                    count_truncated(encoder.tokenize, batch.captions, batch.tokens)
                )
        own.sample_ids.append(batch.sample_ids)
        own.classes.append(batch.class_indices)
        own.captions += _by_sample(batch)
        own.digests += batch.digests
        own.keys += batch.keys
        own.metadata += batch.metadata
    for features in (own.images, own.texts):
        features[:] = [torch.cat(features).cpu()] if features else []
    parts = collectives.gather_objects(own)
    full = _Encoded(
        **{f.name: [item for part in parts for item in getattr(part, f.name)] for f in fields(own)}
    )
    if not allow_damage:
        require_complete(full.damage)
    if not full.images:
        shown = "".join(f"\n  {found}" for found in full.damage[:5])
        raise UserError(f"no sample could be read{shown}")
    return full


def _by_sample(batch: Batch) -> list[tuple[str, ...]]:
    """The captions of each sample of a batch."""
    owners = batch.caption_owners or range(len(batch.captions))
    captions: list[list[str]] = [[] for _ in batch.keys]
    for owner, caption in zip(owners, batch.captions, strict=True):
        captions[owner].append(caption)
    return [tuple(of_sample) for of_sample in captions]


def _assembled(
    encoder: ImageTextEncoder, full: _Encoded, groups: Int64[Tensor, " samples"] | None = None
) -> EncodedImages:
    return EncodedImages(
        image_features=require_finite(_joined(encoder, full.images), "image", full.keys),
        sample_ids=torch.cat(full.sample_ids),
        class_indices=torch.cat(full.classes),
        captions=full.captions,
        keys=full.keys,
        image_groups=torch.arange(len(full.keys)) if groups is None else groups,
        metadata=full.metadata,
        damage=tuple(full.damage),
        fingerprint=sum(full.digests) % 2**64,
        truncated=sum(full.truncated),
    )


def _joined(encoder: ImageTextEncoder, features: list[Tensor]) -> Float[Tensor, "samples dim"]:
    return torch.cat(features).to(encoder.device)


def require_complete(damage: Sequence[Damage]) -> None:
    """Refuses corrupt data, since metrics of a part of a set are not comparable.

    Raises:
        UserError: names shard and key of the first corrupt sample.
    """
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise UserError(
            f"an evaluation set must be complete: {damage[0]}{more}; fix or remove the corrupt "
            "data, or add --allow-damage to neuclip eval, which evaluates the rest and counts "
            "the corrupt samples in the result"
        )


def require_finite(
    features: Float[Tensor, "samples dim"], side: str, names: list[str]
) -> Float[Tensor, "samples dim"]:
    """Checks that all features are finite, since comparisons with NaN are always false.

    Args:
        features: output of a tower.
        side: name of the tower.
        names: names of the samples or texts, for the message.

    Raises:
        UserError: some features are not finite.
    """
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"the {side} tower returns features that are not finite for {len(bad)} of {len(names)} "
            f"samples (first: {names[int(bad[0])]!r}): the model has diverged or its weights are "
            "corrupt"
        )
    return features


def _fingerprint(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()


def _number(values: Iterable[Hashable]) -> Int64[Tensor, " samples"]:
    """Numbers distinct values from 0, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
