"""`neuclip search`: searches images by text or by image, on a local web page.

Imports torch only when it runs.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags
from neuclip.cli.data import TimedReadingFlags
from neuclip.cli.options import check_range
from neuclip.errors import quantity
from neuclip.masking import mask

if TYPE_CHECKING:
    from neuclip.data.sources.source import Source
    from neuclip.model.load import Pretrained
    from neuclip.search.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Search(CheckpointFlags, TimedReadingFlags):
    """Search images by text or by image, on a local web page.

    Images are embedded once; their features are kept on disk, by checkpoint and data. The page is
    served on 127.0.0.1 only, at an address that nobody can guess, and needs no network. Ctrl-C
    stops the server.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN", help_behavior_hint="")]
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    images: Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")]
    """images to search, in the form of --train-data: shards, tables or folders, joined by ::"""
    port: int = 8765
    """port of the page; 0: any free port"""
    embeddings: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: in the user's cache)")
    ] = None
    """folder for the features"""
    batch_size: int = 256
    """images per forward pass"""
    workers: int = 2
    """processes that read images"""
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N,mps}")] = "auto"
    """device to compute on"""


def search(command: Search) -> int:
    """Embeds the images and serves the page until interrupted.

    Raises:
        UserError: checkpoint or data cannot be read, or the port is in use.
    """
    check_range("port", command.port, ge=0, le=65535)
    check_range("batch-size", command.batch_size, ge=1)
    check_range("workers", command.workers, ge=0)
    command.data_config()

    from neuclip.model.load import load_pretrained
    from neuclip.search.local_server import LocalServer
    from neuclip.search.server import About, page_answers

    with LocalServer(command.port) as server:  # takes the port before the images are embedded
        model = load_pretrained(command.choice(command.run), command.device)
        with contextlib.closing(command.open(command.images, captions="optional")) as source:
            engine = _engine(command, model, source)
            found = engine.embeddings
            name = model.checkpoint.name or model.checkpoint.path.stem
            about = About(name, mask(command.images), len(found), found.damaged, found.damage)
            server.start(page_answers(engine, about))
            print(f"{server.address}  (Ctrl-C stops it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("stopped")
    return 0


def _engine(command: Search, model: "Pretrained", source: "Source") -> "Engine":
    """Builds the engine and prints where the features came from."""
    from neuclip.search.embeddings import EmbedSettings, default_cache, embed_source
    from neuclip.search.engine import Engine

    cache = command.embeddings or default_cache()
    settings = EmbedSettings(
        cache, command.batch_size, command.workers, command.data_config().data_timeout
    )
    checkpoint = model.checkpoint
    print(
        f"{checkpoint.shown} ({checkpoint.arch}) over {quantity(len(source), 'sample')}", flush=True
    )
    with terminal.progress() as progress:
        found = embed_source(model.encoder, model.sha256, source, settings, progress)
    kept = "already embedded" if found.reused else "embedded"
    print(f"{quantity(len(found), 'image')} {kept}; features in {cache}", flush=True)
    if found.damaged:
        terminal.say(f"{found.damaged} corrupt samples left out: {found.damage}")
    return Engine(model.encoder, source, found)
