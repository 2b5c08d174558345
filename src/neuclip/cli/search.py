"""`neuclip search`: searches images by text or by image, on a local web page.

Imports torch only when it runs.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.embedding_flags import EmbeddingFlags, say_damage
from neuclip.cli.options import Switch, check_range
from neuclip.errors import UserError, quantity
from neuclip.files import cache_home
from neuclip.masking import mask

if TYPE_CHECKING:
    from collections.abc import Generator

    from neuclip.data.sources.source import Source
    from neuclip.embedding.embedding_store import EmbeddingStore, StoreManifest
    from neuclip.embedding.stored_images import StoredImages
    from neuclip.model.load import Pretrained
    from neuclip.search.approximate_search import ApproximateSearch


@dataclass(frozen=True, kw_only=True)
class Search(EmbeddingFlags):
    """Search images by text or by image, on a local web page.

    Images are embedded once, into a folder as neuclip embed writes it; a stopped command goes on
    where it was. The page is served on 127.0.0.1 only, at an address that nobody can guess, and
    needs no network. Ctrl-C stops the server.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN", help_behavior_hint="")]
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    images: Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")]
    """images to search: data as for --train-data (shards, tables or folders, joined by ::), or a
    folder that neuclip embed has written of them"""
    port: int = 8765
    """port of the page; 0: any free port"""
    embeddings: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: in the user's cache)")
    ] = None
    """folder with the features of the images: that neuclip embed has written, or to fill"""
    index: Switch = False
    """search approximately, with an index that is built once beside the features (faiss); its
    recall is measured and shown"""

    def check(self) -> None:
        """Checks the flags before any work.

        Raises:
            UserError: they contradict each other, or a number is out of range.
        """
        super().check()
        check_range("port", self.port, ge=0, le=65535)
        if self._names_a_store and self.embeddings is not None:
            raise UserError(
                f"--images {self.images} holds embeddings: leave out --embeddings, or name the "
                "images themselves"
            )

    @contextlib.contextmanager
    def opened(self) -> "Generator[tuple[Source, StoreManifest | None, Path | None]]":
        """The images, with the manifest of a folder of their embeddings, and that folder.

        Both are None unless there is one.

        Raises:
            UserError: the images cannot be opened, or the manifest is damaged.
        """
        from neuclip.embedding.embedding_store import EmbeddingStore, is_store

        folder = Path(self.images) if self._names_a_store else self.embeddings
        kept = None
        if folder is not None and is_store(folder):
            kept = EmbeddingStore.open(folder).manifest
        # As `neuclip embed` opened them: with their captions, images without one are corrupt.
        captions = "required" if kept is not None and kept.texts else "optional"
        name = kept.source if kept is not None and self._names_a_store else self.images
        try:
            source = self.open(name, captions=captions)
        except UserError as error:
            if not self._names_a_store:
                raise
            raise UserError(
                f"{folder} holds embeddings of {name}, which cannot be opened from here ({error}): "
                f"name the images, and the folder with --embeddings {folder}"
            ) from None
        with contextlib.closing(source):
            yield source, kept, folder

    def embedded(
        self,
        model: "Pretrained",
        source: "Source",
        kept: "StoreManifest | None",
        folder: Path | None,
    ) -> "EmbeddingStore":
        """The folder with the features of all images, which are computed if they are missing.

        Args:
            model: the model.
            source: the images.
            kept: manifest of the folder, if it holds embeddings.
            folder: the folder; if none, one in the user's cache.

        Raises:
            UserError: the folder holds something else, or no image can be read.
        """
        from neuclip.embedding.embedding_store import EmbeddingStore
        from neuclip.embedding.sharded_embedding import StoreOptions

        name = self.images if kept is None or not self._names_a_store else kept.source
        manifest = StoreOptions().manifest(model, source, name, self.batch_size)
        if folder is None:
            folder = cache_home() / "embeddings" / manifest.digest
        if kept is not None:
            manifest = manifest.with_settings_of(kept)
            if not EmbeddingStore(folder, kept).pending():  # nothing is computed in a precision
                manifest = manifest.model_copy(update={"precision": kept.precision})
        flag = "--images" if self._names_a_store else "--embeddings"
        return self.embed(model, source, manifest, folder, flag)

    @property
    def _names_a_store(self) -> bool:
        from neuclip.embedding.embedding_store import is_store

        return is_store(Path(self.images))


def search(command: Search) -> int:
    """Embeds the images and serves the page until interrupted.

    Raises:
        UserError: checkpoint or data cannot be read, or the port is in use.
    """
    command.check()

    from neuclip.embedding.stored_images import StoredImages
    from neuclip.search.engine import Engine
    from neuclip.search.local_server import LocalServer
    from neuclip.search.server import About, page_answers

    with (
        LocalServer(command.port) as server,  # takes the port before the images are embedded
        command.opened() as (source, kept, folder),
    ):
        model = command.load(command.run, 0)
        store = command.embedded(model, source, kept, folder)
        with terminal.progress() as progress:
            images = StoredImages.open(store, progress)
        print(f"{quantity(len(images), 'image')}; features in {store.folder}", flush=True)
        say_damage(source, store)
        index = _index(store.folder, images, model) if command.index else None
        how = "exact search" if index is None else f"index: {index.record.described}"
        _, damage = store.summary()
        damage.add(source.damage)
        name = model.checkpoint.name or model.checkpoint.path.stem
        about = About(
            name, mask(store.manifest.source), len(images), damage.total, damage.summary(), how
        )
        server.start(page_answers(Engine(model.encoder, source, images, index), about))
        print(f"{server.address}  (Ctrl-C stops it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0


def _index(folder: Path, images: "StoredImages", model: "Pretrained") -> "ApproximateSearch":
    """The index beside the features, which is built if there is none; prints its recall."""
    import numpy as np

    from neuclip.search.approximate_search import ApproximateSearch, sample_queries

    place = folder / "index"
    with terminal.progress() as progress:
        index = ApproximateSearch.open(place, images)
        built = index is None
        if index is None:
            samples = sample_queries(model.encoder, images, np.random.default_rng(0))
            index = ApproximateSearch.build(place, images, samples, progress)
    record = index.record
    queries = " and ".join(f"{number} {kind}" for kind, number in record.queries.items())
    print(
        f"index {'built' if built else 'there already'}: {record.described} (measured on "
        f"{queries}); a query looks at {record.probes} of {quantity(record.lists, 'list')}",
        flush=True,
    )
    return index
