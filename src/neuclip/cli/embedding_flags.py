"""Flags of the commands that embed data, and how they embed. Imports no torch."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags
from neuclip.cli.data import TimedReadingFlags
from neuclip.cli.options import check_range
from neuclip.errors import UserError, quantity
from neuclip.files import cache_home, check_writable, writing

if TYPE_CHECKING:
    from neuclip.data.sources.source import Captions, Source
    from neuclip.embedding.embedding_store import EmbeddingStore, StoreManifest
    from neuclip.evaluation.interfaces import EvaluationSettings
    from neuclip.model.load import Pretrained


@dataclass(frozen=True, kw_only=True)
class EmbeddingFlags(CheckpointFlags, TimedReadingFlags):
    """How to embed."""

    batch_size: int = 256
    """images or texts per forward pass"""
    workers: Annotated[int, arg(aliases=("--num-prepro-workers",))] = 2
    """processes that read images"""
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N,mps}")] = "auto"
    """device to compute on"""

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: one is out of range.
        """
        check_range("batch-size", self.batch_size, ge=1)
        check_range("workers", self.workers, ge=0)
        self.data_config()

    def load(self, run: Path, local_rank: int) -> "Pretrained":
        """The model, in the precision of evaluation.

        Args:
            run: what the flags choose a checkpoint of.
            local_rank: index of the GPU on this machine.

        Raises:
            UserError: the model cannot be loaded.
        """
        from neuclip.model.load import load_towers

        return load_towers(self.choice(run), self.device, local_rank)

    def embed(
        self,
        model: "Pretrained",
        source: "Source",
        manifest: "StoreManifest",
        out: Path,
        flag: str = "--out",
    ) -> "EmbeddingStore":
        """Embeds a source into a folder, or the rest of it. All ranks call it together.

        One command at a time fills a folder; a complete one is not locked.

        Args:
            model: the model.
            source: the data.
            manifest: what the folder is to hold.
            out: the folder.
            flag: that names the folder, for messages.

        Raises:
            UserError: no sample can be read, or the folder holds something else or is in use.
        """
        from neuclip.embedding.embedding_store import EmbeddingStore, is_complete, locked_kind
        from neuclip.embedding.sharded_embedding import fill_store
        from neuclip.parallel import collectives
        from neuclip.parallel.folder_lock import FolderLock
        from neuclip.parallel.work_sharing import from_main

        def begin() -> EmbeddingStore:
            if out.exists() and not out.is_dir():
                raise UserError(f"{flag} {out} is a file: name a folder")
            if not is_complete(out):
                with writing(out):
                    out.mkdir(parents=True, exist_ok=True)
                lock.acquire(out)
            return EmbeddingStore.begin(out, manifest)

        with FolderLock(locked_kind(flag)) as lock, terminal.progress() as progress:
            store = from_main(begin)
            settings = self.settings()
            if collectives.is_main():
                done = store.num_shards - len(store.pending())
                reused = f"; {done} of {quantity(store.num_shards, 'shard')} already" * bool(done)
                terminal.say(
                    f"embedding {quantity(len(source), 'sample')} with {model.checkpoint.shown} "
                    f"({model.checkpoint.arch}){reused}"
                )
                settings = replace(settings, progress=progress)
            fill_store(store, model.encoder, source, settings)
        return store

    def settings(self) -> "EvaluationSettings":
        """The flags as settings of evaluation."""
        from neuclip.evaluation.interfaces import EvaluationSettings

        return EvaluationSettings(
            batch_size=self.batch_size,
            workers=self.workers,
            stall_limit=self.data_config().data_timeout,
        )


@dataclass(frozen=True, kw_only=True)
class StoredFlags(EmbeddingFlags):
    """Data to embed, or a folder of embeddings."""

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """folder that neuclip embed has written; or data as for --train-data, with --run"""
    run: Annotated[
        Path | None, arg(metavar="RUN", aliases=("--checkpoint",), help_behavior_hint="")
    ] = None
    """model to embed data with: run folder, checkpoint file, repository, or published weights"""
    embeddings: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: in the user's cache)")
    ] = None
    """folder for the features of data, which a repeated command reuses"""
    save_path: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """write what is kept: keys to FILE.txt, or uids to FILE.npy for DataComp's resharder"""
    uid_key: Annotated[str | None, arg(metavar="KEY", help_behavior_hint="")] = None
    """with --save-path: key of the samples' .json that holds their uid; DataComp's is uid"""
    out: Annotated[Path | None, arg(metavar="FILE.csv", help_behavior_hint="")] = None
    """write a table of all samples"""

    def check(self) -> None:
        """Checks the flags before any work.

        Raises:
            UserError: they contradict each other, or a number is out of range.
        """
        super().check()
        if self._is_stored:
            names = ("run", "embeddings", "uid_key", "epoch", "iter", "best", "arch", "no_ema")
            given = [name for name in names if getattr(self, name) not in (None, False)]
            for name in (*given, *self.model, *self.reading):
                raise UserError(
                    f"--{name.replace('_', '-')} is for data that are embedded now, and "
                    f"{self.source} holds embeddings: leave it out"
                )
        elif self.run is None:
            raise UserError(
                f"{self.source} is not a folder of embeddings: name the model to embed data with "
                "(--run RUN)"
            )
        outputs = [("--out", self.out), ("--save-path", self.save_path)]
        check_outputs(outputs, [*data_files(self.source), ("--run", self.run)])
        if self.out is not None:
            check_writable(self.out, "--out")
        if self.save_path is not None:
            from neuclip.embedding.kept_samples import check_kept_path

            check_kept_path(self.save_path)
            check_writable(self.save_path, "--save-path")
        elif self.uid_key is not None:
            raise UserError("--uid-key has no effect without --save-path")

    @property
    def _is_stored(self) -> bool:
        from neuclip.embedding.embedding_store import is_store

        return is_store(Path(self.source))

    @contextlib.contextmanager
    def stored(self, *, texts: bool) -> "Generator[Stored]":
        """The embeddings of the source. Data are embedded first, by all ranks.

        Args:
            texts: captions are needed, too.

        Raises:
            UserError: model or data cannot be read, or the embeddings are damaged.
        """
        import torch

        from neuclip.embedding.embedding_store import EmbeddingStore
        from neuclip.embedding.sharded_embedding import StoreOptions
        from neuclip.parallel.process_group import open_process_group

        if self.run is None:
            yield Stored(EmbeddingStore.open(Path(self.source)), None)
            return
        with (
            open_process_group(torch.device("cpu")) as launch,
            contextlib.closing(self._opened("required" if texts else "optional")) as source,
        ):
            model = self.load(self.run, launch.local_rank)
            options = StoreOptions(texts)
            manifest = options.manifest(model, source, self.source, self.batch_size)
            folder = self.embeddings or cache_home() / "embeddings" / manifest.digest
            store = self.embed(model, source, manifest, folder, "--embeddings")
            if launch.rank == 0:
                terminal.say(f"features in {folder}")
                say_damage(source, store)
            yield Stored(store, source)

    def _opened(self, captions: "Captions") -> "Source":
        from neuclip.data.annotations import MissingKeyError
        from neuclip.data.opening import open_source

        # Uids are read as labels are.
        reading = self.data_config().model_copy(update={"label_key": self.uid_key})
        try:
            with terminal.progress() as progress:
                return open_source(self.source, reading, progress, captions=captions)
        except MissingKeyError as error:
            raise UserError(str(error).replace("for --label-key", "for --uid-key")) from None


class Stored(NamedTuple):
    """Embeddings, and the data that they were made of if those are at hand."""

    store: "EmbeddingStore"
    source: "Source | None"

    def names(self, positions: list[int], keys: list[str], uid_key: str | None) -> list[str]:
        """What a list of kept samples calls samples: their uids if a key is given, or their keys.

        Raises:
            UserError: a sample has no uid.
        """
        from neuclip.embedding.kept_samples import read_uids

        if uid_key is None or self.source is None:
            return keys
        return read_uids(self.source, positions)


def check_outputs(
    outputs: Sequence[tuple[str, Path | None]], inputs: Sequence[tuple[str, Path | None]]
) -> None:
    """Checks that outputs replace no input, no other output, and no file of embeddings.

    Args:
        outputs: files to write, each with the flag that names it; None: not given.
        inputs: files that are read, likewise.

    Raises:
        UserError: an output would.
    """
    from neuclip.embedding.embedding_store import is_store

    taken = {path.resolve(): flag for flag, path in inputs if path is not None}
    for flag, path in outputs:
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise UserError(f"{flag} {path} would replace the file of {other}: name another file")
        if is_store(path.resolve().parent):
            raise UserError(
                f"{flag} {path} is in a folder of embeddings, whose files neuclip replaces: name a "
                "file in another folder"
            )


def data_files(source: str) -> list[tuple[str, Path | None]]:
    """The files that a source names one by one, as inputs for `check_outputs`."""
    return [("SOURCE", Path(part)) for part in source.split("::") if part]


def say_damage(source: "Source", store: "EmbeddingStore") -> None:
    """Prints what was left out, with examples."""
    _, damage = store.summary()
    damage.add(source.damage)
    if damage.total:
        terminal.say(f"{quantity(damage.total, 'corrupt sample')} left out: {damage.summary()}")
        for found in damage.examples[:5]:
            terminal.say(f"  {found}")
