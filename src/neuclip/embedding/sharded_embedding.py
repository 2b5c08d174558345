"""Fills a folder of embeddings from a source: by all ranks, shard by shard, on from where it is.

Batches are cut by position in the source, as evaluation cuts them, so a feature does not depend on
how often the work was interrupted, or on the number of ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from neuclip.data.batch import Batch, Unreadable
from neuclip.data.damage import DamageLog
from neuclip.data.loader import LoaderSettings, evaluation_loader, evaluation_requests
from neuclip.data.sources.source import Source, content_digest
from neuclip.embedding.embedding_store import MOST_SHARDS, EmbeddingStore, StoreManifest
from neuclip.embedding.shard_files import EmbeddedShard, Form, Rows
from neuclip.errors import UserError, quantity
from neuclip.evaluation.embed import require_finite
from neuclip.evaluation.interfaces import EvaluationSettings, ImageTextEncoder
from neuclip.masking import mask
from neuclip.model.load import Pretrained
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main


@dataclass(frozen=True)
class StoreOptions:
    """What to embed, and how to write it.

    Attributes:
        texts: also embed the first caption of each sample.
        form: of the files.
        dtype: type of the features on disk.
        shard_samples: samples per shard, rounded up to full batches.
    """

    texts: bool = False
    form: Form = "npy"
    dtype: Literal["float32", "float16"] = "float32"
    shard_samples: int = 10_000

    def manifest(
        self, model: Pretrained, source: Source, name: str, batch_size: int
    ) -> StoreManifest:
        """The manifest of the embeddings of a source.

        Args:
            model: the model.
            source: the data.
            name: the data as the user names them.
            batch_size: samples per forward pass.

        Raises:
            UserError: there would be too many shards.
        """
        batches = -(-self.shard_samples // batch_size)
        shards = -(-len(source) // (batches * batch_size))
        if shards > MOST_SHARDS:
            raise UserError(
                f"{self.shard_samples} samples per shard would make {shards:,} shards, and "
                f"{MOST_SHARDS:,} are the limit: raise --shard-samples"
            )
        clip, checkpoint = model.clip, model.checkpoint
        return StoreManifest(
            model=model.sha256,
            model_name=str(checkpoint.shown),
            arch=checkpoint.arch,
            preprocessing=clip.architecture.record()["preprocess_cfg"],
            precision=clip.precision,
            source=mask(name),
            source_digest=content_digest(source),
            samples=len(source),
            dim=clip.embed_dim,
            dtype=self.dtype,
            texts=self.texts,
            form=self.form,
            batch_size=batch_size,
            shard_samples=batches * batch_size,
        )


def fill_store(
    store: EmbeddingStore, encoder: ImageTextEncoder, source: Source, settings: EvaluationSettings
) -> None:
    """Embeds the samples of the shards that are not finished. All ranks call it together.

    A rank takes every n-th shard. Memory is bounded by one shard and the batches read ahead.

    Args:
        store: what to fill.
        encoder: the towers of its manifest.
        source: the data of its manifest.
        settings: workers, how long to wait for them, and progress.

    Raises:
        UserError: no sample can be read, a feature is not finite, or the disk is full.
    """
    pending = from_main(store.pending)
    mine = pending[collectives.rank() :: collectives.world_size()]
    if mine:
        _fill(store, encoder, source, settings, mine)
    collectives.barrier()
    from_main(lambda: _check_filled(store))


def _check_filled(store: EmbeddingStore) -> None:
    store.remove_leftovers()
    rows, damage = store.summary()
    if not rows:
        shown = "".join(f"\n  {found}" for found in damage.examples[:5])
        samples = quantity(store.manifest.samples, "sample")
        raise UserError(f"none of {samples} could be read: {damage.summary()}{shown}")


def _fill(
    store: EmbeddingStore,
    encoder: ImageTextEncoder,
    source: Source,
    settings: EvaluationSettings,
    shards: list[int],
) -> None:
    manifest = store.manifest
    requests = [
        evaluation_requests(store.positions(shard), manifest.batch_size) for shard in shards
    ]
    batches = evaluation_loader(
        source,
        encoder.transform,
        encoder.tokenize if manifest.texts else _no_tokens,
        [*chain(*requests)],
        LoaderSettings(
            manifest.batch_size,
            workers=settings.workers,
            pin_memory=encoder.device.type == "cuda",
            stall_limit=settings.stall_limit,
        ),
    )
    reported = _reported(batches, sum(map(len, requests)), settings)
    for shard, of_shard in zip(shards, requests, strict=True):
        part = _encoded(encoder, islice(reported, len(of_shard)), texts=manifest.texts)
        store.write(shard, part.content(manifest), part.damage)


def _reported(
    batches: Iterator[Batch | Unreadable], total: int, settings: EvaluationSettings
) -> Iterator[Batch | Unreadable]:
    progress = settings.reporting("embedding")
    for done, batch in enumerate(batches):
        if progress is not None:
            progress(done, total)
        yield batch


@dataclass
class _Part:
    """The encoded batches of one shard; features stay on the device until it is complete."""

    images: list[Tensor] = field(default_factory=list[Tensor])
    texts: list[Tensor] = field(default_factory=list[Tensor])
    positions: list[Tensor] = field(default_factory=list[Tensor])
    keys: list[str] = field(default_factory=list[str])
    captions: list[str] = field(default_factory=list[str])
    damage: DamageLog = field(default_factory=DamageLog)

    def content(self, manifest: StoreManifest) -> EmbeddedShard:
        """The shard as it is written.

        Raises:
            UserError: a feature is not finite.
        """
        positions = torch.cat(self.positions).numpy() if self.positions else np.empty(0, np.int64)
        images = self._rows(self.images, "image", manifest)
        texts = self._rows(self.texts, "text", manifest) if manifest.texts else None
        return EmbeddedShard(positions, self.keys, self.captions, images, texts)

    def _rows(self, features: list[Tensor], side: str, manifest: StoreManifest) -> Rows:
        kind = np.dtype(manifest.dtype)
        if not features:
            return np.empty((0, manifest.dim), kind)
        return require_finite(torch.cat(features), side, self.keys).cpu().numpy().astype(kind)


def _encoded(
    encoder: ImageTextEncoder, batches: Iterable[Batch | Unreadable], *, texts: bool
) -> _Part:
    part = _Part()
    for batch in batches:
        part.damage.add(batch.damage)
        if isinstance(batch, Unreadable):
            continue
        with torch.no_grad():
            part.images.append(encoder.encode_image(batch.images))
            if texts:
                part.texts.append(encoder.encode_text(batch.tokens))
        part.positions.append(batch.sample_ids)
        part.keys += batch.keys
        part.captions += batch.captions
    return part


def _no_tokens(texts: list[str]) -> Tensor:
    """Placeholder tokens where captions are not embedded."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)
