"""The small valid files that are damaged; each is made once, before the first case."""

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

WORDS = 49408  # of CLIP's vocabulary
TINY = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8,
    },
    "text_cfg": {"context_length": 8, "vocab_size": WORDS, "width": 8, "heads": 1, "layers": 1},
}  # fmt: skip
_PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def picture(kind: str = "jpeg", side: int = 24, **options: object) -> bytes:
    """A small image file."""
    pixels = np.arange(side * side * 3, dtype=np.uint32).reshape(side, side, 3) * 7919 % 251
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.astype(np.uint8))
    (image.convert("P") if kind == "gif" else image).save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def pictures() -> tuple[tuple[str, bytes], ...]:
    """An image file of each kind that is decoded, with its ending."""
    frames = [Image.new("P", (20, 20), shade) for shade in (1, 90, 200)]
    animated = io.BytesIO()
    frames[0].save(animated, "gif", save_all=True, append_images=frames[1:], duration=9)
    several = io.BytesIO()
    frames[0].convert("RGB").save(
        several, "mpo", save_all=True, append_images=[frames[1].convert("RGB")]
    )
    found = [
        ("jpg", picture("jpeg")),
        ("jpg", picture("jpeg", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")),
        ("png", picture("png")),
        ("png", _png(Image.new("I;16", (9, 9), 40_000))),
        ("png", _png(Image.new("LA", (9, 9)), icc_profile=b"x" * 200)),
        ("webp", picture("webp")),
        ("webp", picture("webp", lossless=True)),
        ("gif", animated.getvalue()),
        ("bmp", picture("bmp")),
        ("tif", picture("tiff", compression="tiff_lzw")),
        ("tif", picture("tiff", compression="tiff_adobe_deflate")),
        ("ppm", picture("ppm")),
        ("jpg", several.getvalue()),
        ("dib", picture("dib")),
    ]
    if features.check("jpg_2000"):
        found.append(("jp2", picture("jpeg2000")))
    if features.check("avif"):
        found.append(("avif", picture("avif")))
    return tuple(found)


def _png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", **options)
    return buffer.getvalue()


@cache
def shard(samples: int = 6, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar shard with images, captions, JSON and classes; one key is long."""
    buffer, image = io.BytesIO(), picture("png", 6)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(samples):
            key = "k" * 120 if number == 2 and form != tarfile.USTAR_FORMAT else f"{number:05d}"
            facts = json.dumps({"caption": f"number {number}", "sizes": [number, {"w": 1.5}]})
            for ending, content in (
                ("png", image),
                ("txt", f"number {number}".encode()),
                ("json", facts.encode()),
                ("cls", str(number).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def table(rows: int = 40):
    """An Arrow table of images and captions, as `datasets` writes them."""
    import pyarrow

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    content = picture("png", 6)
    images = [{"bytes": content, "path": f"{number}.png"} for number in range(rows)]
    texts = [f"number {number}" for number in range(rows)]
    return pyarrow.table({"image": pyarrow.array(images, image), "text": texts})


@cache
def parquet(compression: str) -> bytes:
    """A parquet file of four row groups."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table(), buffer, row_group_size=10, compression=compression)
    return buffer.getvalue()


@cache
def arrow(compression: str | None, *, stream: bool = True) -> bytes:
    """An Arrow stream, or file, of four batches."""
    import pyarrow

    buffer, content = io.BytesIO(), table()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(buffer, content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=10)
    return buffer.getvalue()


# --- models and runs -----------------------------------------------------------------------------


@cache
def _home() -> Path:
    """A folder for files that are too large to keep in memory; deleted at exit."""
    import atexit

    folder, owner = Path(tempfile.mkdtemp(prefix="fuzz-valid-")), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@cache
def run_folder() -> Path:
    """A run folder with two checkpoints, results, a gallery and outcomes."""
    from neuclip.cli.app import main
    from neuclip.evaluation.outcomes import Outcomes, write_outcomes
    from neuclip.evaluation.results import (
        Gallery,
        Picture,
        Query,
        Retrieved,
        write_eval_result,
        write_gallery,
    )
    from neuclip.run_folder import RunFolder

    home = _home()
    model = home / "tiny.json"
    model.write_text(json.dumps(TINY))
    line = (
        f"train --train-data synthetic:16 --model {model} --epochs 2 --batch-size 8 --workers 0 "
        f"--logs {home / 'logs'} --name run --device cpu --log-every-n-steps 1 --lr 1e-3 "
        "--save-frequency 1 --method openclip --warmup 1"
    )
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(line.split()) == 0
    folder = RunFolder(home / "logs" / "run")
    for split in ("unseen", "val/two"):
        write_eval_result(folder.results(2), split, {"acc1": 0.5, "main_metric": 0.5})
    shown = Picture("0001", "a caption", "iVBORw0KGgo=")
    query = Query("a caption", shown, [Retrieved(shown, 0.4, True)] * 3)
    write_gallery(folder.gallery("unseen"), Gallery("unseen", 1, [query, query]))
    right = Outcomes("mean", np.ones(40, np.float32), np.zeros(40, np.int32))
    write_outcomes(folder.split_outcomes("unseen"), right)
    return folder.path


def copied_run(folder: Path, *, checkpoints: bool = False) -> Path:
    """A copy of the run folder inside a folder; hard links stand for the checkpoints."""
    target = folder / "logs" / "run"
    shutil.copytree(run_folder(), target, copy_function=_copied, ignore=_IGNORED)
    if not checkpoints:
        shutil.rmtree(target / "checkpoints")
    return target


_IGNORED = shutil.ignore_patterns("*.lock", "iter_*")


def _copied(source: str, target: str) -> None:
    if source.endswith(".pt"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


@cache
def weights() -> dict[str, torch.Tensor]:
    """The weights of the tiny model, by open_clip's names."""
    content = torch.load(run_folder() / "checkpoints" / "epoch_2.pt", weights_only=True)
    return content["state_dict"]


@cache
def small_checkpoint() -> bytes:
    """A checkpoint whose text table is cut to 64 words, so that its bytes are mostly structure."""
    content = torch.load(run_folder() / "checkpoints" / "epoch_2.pt", weights_only=True)
    content["optimizer"] = {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}
    return saved(_cut(content))


def _cut(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value[:64].clone() if value.ndim and len(value) == WORDS else value
    if isinstance(value, dict):
        return {key: _cut(each) for key, each in value.items()}
    return value


def saved(content: object, **options: object) -> bytes:
    """What torch writes; the content may be deeper than Python's stack usually is."""
    buffer, limit = io.BytesIO(), sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        torch.save(content, buffer, **options)
    finally:
        sys.setrecursionlimit(limit)
    return buffer.getvalue()


@cache
def plain_forms() -> tuple[tuple[str, bytes], ...]:
    """Files of weights of each format: endings and contents."""
    import safetensors.torch

    small = {name: _cut(value) for name, value in weights().items()}
    return (
        ("pt", small_checkpoint()),
        ("pt", saved(small, _use_new_zipfile_serialization=False)),
        ("bin", saved({"state_dict": small, "epoch": 3})),
        ("safetensors", safetensors.torch.save(small)),
        ("pt", torchscript()),
    )


@cache
def torchscript() -> bytes:
    """A TorchScript archive."""
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)), buffer)
    return buffer.getvalue()


@cache
def sharded() -> Path:
    """A sharded checkpoint, as FSDP runs write it."""
    import torch.distributed as dist

    from neuclip.checkpoint import sharded as form

    home = _home()
    path = home / "epoch_1"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    content = torch.load(io.BytesIO(small_checkpoint()), weights_only=True)
    written = form.begin(path, content, dist.group.WORLD)
    form.wait(path, written)
    form.finish(path)
    dist.destroy_process_group()
    return path


@cache
def repository() -> dict[str, bytes]:
    """A repository of open_clip's: the files but the weights."""
    return {
        "open_clip_config.json": json.dumps(
            {"model_cfg": TINY, "preprocess_cfg": _PREPROCESS}
        ).encode()
    }


TRANSFORMERS = {
    "model_type": "clip",
    "projection_dim": 8,
    "logit_scale_init_value": 2.6,
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": WORDS,
        "max_position_embeddings": 8, "intermediate_size": 32, "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
}  # fmt: skip


def rezipped(content: bytes, change: dict[str, bytes]) -> bytes:
    """A zip archive with some members replaced, and correct checksums."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change.get(name, old.read(name)))
    return buffer.getvalue()
