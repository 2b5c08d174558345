"""`neuclip embed`: writes the features of a data set to a folder.

Imports torch only when it runs.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from neuclip.cli.embedding_flags import EmbeddingFlags, say_damage
from neuclip.cli.options import Switch, check_range
from neuclip.errors import quantity


@dataclass(frozen=True, kw_only=True)
class Embed(EmbeddingFlags):
    """Embed the images of a data set, and its captions, into a folder of shards with keys.

    Features have unit norm and are those of neuclip eval. A stopped command goes on where it was
    when it is repeated, also with another number of processes (torchrun, srun). The folders img_emb
    and text_emb are laid out as by clip-retrieval inference.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """data as for `neuclip train --train-data`: shards, tables, folders; :: joins several"""
    run: Annotated[Path, arg(metavar="RUN", aliases=("--checkpoint",), help_behavior_hint="")]
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    out: Annotated[Path, arg(metavar="DIR", aliases=("--output-folder",), help_behavior_hint="")]
    """folder to fill"""
    enable_text: Switch = False
    """also embed the first caption of each image; a sample without one is then corrupt"""
    format: Literal["npy", "parquet"] = "npy"
    """npy: arrays, with keys and captions in .jsonl; parquet: one table per shard"""
    dtype: Literal["float32", "float16"] = "float32"
    """type of the features on disk"""
    shard_samples: int = 10_000
    """samples per shard, rounded up to full batches; each process embeds whole shards"""


def embed(command: Embed) -> int:
    """Embeds, and prints the number of features.

    Raises:
        UserError: model or data cannot be read, or the folder holds something else.
    """
    command.check()
    check_range("shard-samples", command.shard_samples, ge=1)
    if command.format == "parquet":
        from neuclip.data.sources.arrow_columns import pyarrow

        pyarrow(command.out)  # if it is missing, say so before the work

    import torch

    from neuclip.embedding.sharded_embedding import StoreOptions
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group

    captions = "required" if command.enable_text else "optional"
    options = StoreOptions(
        command.enable_text, command.format, command.dtype, command.shard_samples
    )
    # The ranks only share work, for which gloo serves any device.
    with (
        open_process_group(torch.device("cpu")) as launch,
        contextlib.closing(command.open(command.source, captions=captions)) as source,
    ):
        model = command.load(command.run, launch.local_rank)
        manifest = options.manifest(model, source, command.source, command.batch_size)
        store = command.embed(model, source, manifest, command.out)
        if collectives.is_main():
            rows, _ = store.summary()
            both = " and their first captions" if command.enable_text else ""
            print(
                f"{quantity(rows, 'image')}{both}: {store.manifest.dim} dimensions, unit norm, "
                f"{command.dtype}, {quantity(store.num_shards, 'shard')}"
            )
            print(f"written to {command.out}")
            say_damage(source, store)
    return 0
