"""Two processes against one: loss and gradients of every kind of exchange.

On one card gloo passes the messages if it can pass CUDA tensors; NCCL wants a card a process.
"""

import datetime
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from gpu_check.part import Job
from neuclip import create_loss
from neuclip.parallel import collectives

METHODS = ("openclip", "siglip", "fastclip_v3", "neuclip_pool", "neuclip")
BATCH, DIM, STEPS = 64, 32, 2
LIMIT = datetime.timedelta(seconds=60)


def run(job: Job) -> None:
    backends = [("gloo", job.device)]
    if job.device == "cuda" and torch.cuda.device_count() > 1 and dist.is_nccl_available():
        backends.append(("nccl", job.device))
    elif job.device == "cuda":
        job.record(backend="nccl", possible=False, why="one card, and NCCL wants one a process")
    for backend, device in backends:
        try:
            found = in_processes(2, backend, device, job.folder)
        except RuntimeError as error:
            job.record(backend=backend, possible=False, why=str(error))
            continue
        for method in METHODS:
            errors = compare(found, steps(method, device), method)
            job.record(backend=backend, method=method, **errors)
            if max(errors.values()) > 1e-4:
                raise SystemExit(f"{method} over {backend} differs from one process: {errors}")


def steps(method: str, device: str) -> dict[str, torch.Tensor]:
    """Loss and feature gradients of this process's share of some batches."""
    settings: dict[str, Any] = {"num_samples": BATCH, "steps_per_epoch": 1}
    if method in {"neuclip", "fastclip_v3"}:
        settings |= {"gamma": 0.5, "gamma_decay_epochs": 1.0}
    if method == "neuclip":
        settings |= {"num_prototypes": 48, "inner_steps": 3}
    if method == "neuclip_pool":
        settings |= {"pool_size": 96}
    loss = create_loss(method, embed_dim=DIM, **settings).to(device)
    share = collectives.owned_slice(BATCH)
    rows = slice(share.start, share.stop)
    values, grads = [], []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        features = torch.randn(2, BATCH, DIM, generator=generator)
        features[1] += features[0]
        leaf = functional.normalize(features, dim=-1)[:, rows].to(device).requires_grad_()
        scale, bias = (torch.tensor(value, device=device) for value in (15.0, -10.0))
        value = loss(*leaf, scale, bias, sample_ids=torch.arange(BATCH)[rows])
        value.backward()
        values.append(value.detach())
        grads.append(leaf.grad)
    return {"values": torch.stack(values).cpu(), "grads": torch.stack(grads).cpu()}


def compare(
    ranks: list[dict[str, dict[str, torch.Tensor]]], one: dict[str, torch.Tensor], method: str
) -> dict[str, float]:
    """The relative differences of losses and gradients from those of one process."""
    values = torch.stack([rank[method]["values"] for rank in ranks]).mean(0)
    # The loss is the mean over ranks, whose gradients DDP averages.
    grads = torch.cat([rank[method]["grads"] for rank in ranks], 2) / len(ranks)
    return {
        "value_error": float((values - one["values"]).abs().max() / one["values"].abs().max()),
        "gradient_error": float((grads - one["grads"]).norm() / one["grads"].norm()),
    }


def in_processes(size: int, backend: str, device: str, folder: Path) -> list[Any]:
    """What each process of a group computed.

    Raises:
        RuntimeError: one of them failed; the message is its own.
    """
    store = folder / f"store_{backend}"
    store.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(size) as pool:
        tasks = [(rank, size, backend, device, str(store)) for rank in range(size)]
        return pool.starmap(rank_of_group, tasks, chunksize=1)


def rank_of_group(rank: int, size: int, backend: str, device: str, store: str) -> dict[str, Any]:
    """The steps of all methods as one rank of a group."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine, maybe without a network
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=LIMIT
    )
    try:
        return {method: steps(method, device) for method in METHODS}
    finally:
        dist.destroy_process_group()
