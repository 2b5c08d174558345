"""Towers trained by several ranks, sharded or not, for the processes of the pool."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from neuclip import create_loss
from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.sections import ModelConfig
from neuclip.config.validation import validate
from neuclip.data.batch import Batch
from neuclip.errors import UserError
from neuclip.model import prepare
from neuclip.model.clip import clamp_logit_scale
from neuclip.model.ema import WeightAverage
from neuclip.model.encoder import Encoder
from neuclip.parallel import collectives, fsdp
from neuclip.training import assemble
from neuclip.training.loss_scale import LossScale
from neuclip.training.momentum import MomentumTowers
from neuclip.training.optim import Optimizer
from tiny_models import VIT, pairs, tiny

BATCH = 12
STEPS = 3


@dataclass(frozen=True)
class Task:
    """How to train for a few steps."""

    model: str = VIT
    method: str = "openclip"
    fsdp: bool = True
    clip: float | None = None
    precision: str = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=lambda: {"beta2": 0.98, "eps": 1e-6})


@dataclass(frozen=True)
class Result:
    """The results of a rank."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    embeddings: Tensor
    own_elements: int
    all_elements: int


def shown(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full weights; of the token table, only the rows that are used."""
    return {k: fsdp.full_tensor(v).detach().clone()[..., :64, :] if v.ndim > 1 else
            fsdp.full_tensor(v).detach().clone() for k, v in weights.items()}  # fmt: skip


def train_towers(task: Task) -> Result:
    """Trains on this rank's share of global batches of BATCH pairs, in float64."""
    settings = ModelConfig(name=task.model, **task.settings)
    exact = task.precision == "fp32"
    init = {"logit_bias": -5.0} if task.method == "siglip" else None
    clip = tiny(task.model, precision=task.precision, init=init)
    model = clip.towers.double() if exact else clip.towers
    prepare.prepare(model, settings)
    if task.fsdp:
        units = prepare.blocks(model)
        fsdp.shard(model, units, torch.device("cpu"), low_precision=clip.autocast_dtype)
    optim = OptimConfig(lr=1e-3, warmup=1, grad_clip_norm=task.clip, **task.optim)
    loss_scale = LossScale(torch.device("cpu")) if task.precision == "amp_fp16" else None
    if loss_scale is not None:
        loss_scale.scale.fill_(1024)
    optimizer = Optimizer(model, optim, 10, loss_scale)
    average = WeightAverage(model, settings.model_ema_decay or 0.5)
    network = {"num_prototypes": 8, "inner_steps": 2, "refresh": "restart"}
    network |= {"gradient": "detached", "gamma": 0.5, "gamma_schedule": "constant"}
    chosen = network if task.method == "neuclip" else {}
    loss = create_loss(task.method, embed_dim=16, steps_per_epoch=STEPS, **chosen)
    loss = loss.double() if exact else loss
    wrapped = collectives.data_parallel(model, torch.device("cpu"))
    share = BATCH // collectives.world_size()
    own = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    ids = torch.arange(share)
    momentum = MomentumTowers.of(loss, clip)
    losses, norms = [], []
    for step in range(STEPS):
        if step == 1:  # as after a resume
            state = optimizer.state_dict()
            optimizer = Optimizer(model, optim, 10, loss_scale)
            optimizer.load_state_dict(state)
        images, tokens = pairs(BATCH, seed=step)
        images = images.double() if exact else images
        keys = {}
        if momentum is not None:
            keys["key_features"] = momentum.keys(
                lambda batch: model(batch.images, batch.tokens),
                [Batch(images[own], tokens[own], ids, ids, [""] * share, [""] * share)],
            )
        with clip.autocast(torch.device("cpu")):
            outputs = wrapped(images[own], tokens[own])
        value = loss(**outputs, sample_ids=None, **keys)
        optimizer.scaled(value).backward()
        losses.append(float(collectives.mean_over_ranks(value.detach())))
        norms.append(float(optimizer.gradient_norm()))
        optimizer.step(skip=torch.zeros(()))
        clamp_logit_scale(model)
        average.update(step + 1)
    if momentum is not None:
        average = momentum.average
    parameters = list(model.parameters())
    return Result(
        losses=losses,
        norms=norms,
        weights=shown(model.state_dict()),
        average=shown(average.state_dict()),
        embeddings=embeddings(clip, average),
        own_elements=sum(fsdp.to_local(p).numel() for p in parameters),
        all_elements=sum(p.numel() for p in parameters),
    )


def embeddings(clip: Any, average: WeightAverage) -> Tensor:
    """Embeddings by the averaged weights; rank 0 encodes twice, the other ranks once."""
    model, before = clip.towers, shown(clip.towers.state_dict())
    exact = next(model.parameters()).dtype == torch.float64
    images, tokens = pairs(4, seed=99)
    encoder = Encoder(clip, torch.device("cpu"))
    encode = model.encode_image if exact else encoder.encode_image
    with average.applied(), fsdp.gathered(model):
        model.eval()
        with torch.no_grad():
            for _ in range(2 if collectives.is_main() else 1):
                found = [encode(images.double() if exact else images)]
                found.append(encoder.encode_text(tokens))
        model.train()
    for name, value in shown(model.state_dict()).items():
        assert torch.equal(value, before[name]), name
    return torch.stack([each.double() for each in found])


def run(tree: dict[str, Any], stop_after: int | None = None) -> str:
    """Runs `train` on this rank; returns the run folder, or the error message."""
    torch.set_num_threads(1)
    if stop_after is not None:
        tree = {**tree, "optim": {**tree["optim"], "stop_epochs": stop_after}}
    try:
        return str(assemble.train(validate(tree, "the test")))
    except UserError as error:
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Reads:
    """Which files of a checkpoint a run hashed, and which it loaded whole with torch.load."""

    folder: str
    hashed: list[str]
    loaded: list[str]


def run_counting_reads(tree: dict[str, Any], checkpoint: Path) -> Reads:
    """A run that records how it reads the checkpoint it resumes."""
    digest, load = hashlib.file_digest, torch.load
    reads = Reads("", [], [])

    def counting_digest(file: BinaryIO, *more: Any) -> Any:
        if Path(file.name).parent == checkpoint:
            reads.hashed.append(Path(file.name).name)
        return digest(file, *more)

    def counting_load(path: Any, **more: Any) -> Any:
        if isinstance(path, Path) and path.parent == checkpoint and not more.get("mmap"):
            reads.loaded.append(path.name)
        return load(path, **more)

    hashlib.file_digest, torch.load = counting_digest, counting_load
    try:
        return replace(reads, folder=run(tree))
    finally:
        hashlib.file_digest, torch.load = digest, load


def write_where_it_fails(tree: dict[str, Any]) -> str:
    """A run whose second rank cannot write its shards of the checkpoint."""
    from neuclip.checkpoint import sharded

    if collectives.rank() == 1:
        write = sharded.FileSystemWriter.write_data

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        sharded.FileSystemWriter.write_data = fail
        try:
            return run(tree)
        finally:
            sharded.FileSystemWriter.write_data = write
    return run(tree)
