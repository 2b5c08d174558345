"""Measures time, bytes and communication of a prototype network sharded over ranks.

    python benchmarks/sharded_prototypes.py --processes 2 --batch-size 512

Starts the ranks (gloo, one thread each) on this machine. Three forms take turns: the sharded
network; the sharded network with two all-reduces (of B maxima and of B sums) instead of the fused
one; and rank 0 alone with the full network. Times are medians of the wall time of the network in
one training step (inner steps and predictions). Each rank should have its own core. Communication
is the time in collectives, including the wait for other ranks. Writes
`sharded_prototypes_RANKS_bBATCH.json` into benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from neuclip import create_loss
from neuclip.method.notation import Anchors, Pairs
from neuclip.parallel import collectives
from neuclip.parallel.collectives import layout_of

RESULTS = Path(__file__).parent / "results"


def two_reductions(value: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """`logsumexp_over_ranks` with two all-reduces: maxima, then sums."""
    if not collectives.is_active():
        return value
    top = collectives.max_over_ranks(value.clone())
    return top + collectives.sum_over_ranks((value - top).exp()).log()


class Network:
    """A prototype network with a batch."""

    def __init__(self, args: argparse.Namespace):
        loss = create_loss(
            "neuclip",
            embed_dim=args.embed_dim,
            steps_per_epoch=1,
            num_prototypes=args.num_prototypes,
            inner_steps=args.inner_steps,
            gamma=0.5,
            gamma_schedule="constant",
        )
        self.normalizer = loss.normalizer
        generator = torch.Generator().manual_seed(0)
        shape = (2, args.batch_size, args.embed_dim)
        features = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
        layout = layout_of(args.batch_size // collectives.world_size(), equal=True)
        local = layout.own(features)
        self.anchors = Anchors(
            pairs=Pairs(local, layout),
            positive=(local[0] * local[1]).sum(-1),
            log_inner=torch.zeros(2, local.shape[1]),
            logit_scale=torch.tensor(20.0),
            global_features=features,
        )
        self.kept = sum(each.numel() * each.element_size() for each in self.normalizer.buffers())

    def step(self) -> float:
        """Runs the network's part of a training step and returns its seconds."""
        begin = time.perf_counter()
        self.normalizer.estimate(self.anchors)
        return time.perf_counter() - begin


class Watch:
    """Measures seconds and bytes of the all-reduces."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.calls = 0.0, 0, 0
        self._reduce: Callable[..., object] = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
        begin = time.perf_counter()
        self._reduce(tensor, *args, **kwargs)
        self.seconds += time.perf_counter() - begin
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1


def shared_step(network: Network, reduction: Callable[..., torch.Tensor]) -> dict[str, float]:
    watch = Watch()
    with (
        mock.patch.object(dist, "all_reduce", watch),
        mock.patch.object(collectives, "logsumexp_over_ranks", reduction),
    ):
        dist.barrier()
        seconds = network.step()
    return {"seconds": seconds, "communication": watch.seconds, "bytes": watch.bytes}


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with mock.patch.object(collectives, "is_active", lambda: False):
        whole = Network(args)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/store", rank=rank, world_size=args.processes
    )
    shared = Network(args)
    reductions = {"fused": collectives.logsumexp_over_ranks, "maxima then sums": two_reductions}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*reductions, "alone"]}
    for number in range(args.rounds + 1):
        for name, reduction in reductions.items():
            result = shared_step(shared, reduction)
            if number:
                found[name].append(result)
        if rank == 0:
            with mock.patch.object(collectives, "is_active", lambda: False):
                seconds = whole.step()
            if number:
                found["alone"].append({"seconds": seconds})
        dist.barrier()
    if rank == 0:
        write(args, found, (whole.kept, shared.kept))
    dist.destroy_process_group()


def write(args, found, kept) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in found[name])

    ratios = [
        a["seconds"] / b["seconds"] for a, b in zip(found["fused"], found["alone"], strict=True)
    ]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/sharded_prototypes.py {' '.join(sys.argv[1:])}".rstrip(),
        "machine": f"CPU, {platform.machine()}, {os.cpu_count()} cores, one thread a process; "
        f"load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "processes": args.processes,
        "seconds_alone": round(median("alone", "seconds"), 4),
        "seconds_shared": round(median("fused", "seconds"), 4),
        "shared_over_alone": round(statistics.median(ratios), 3),
        "kept_bytes_alone": kept[0],
        "kept_bytes_a_process": kept[1],
    }
    for name in ("fused", "maxima then sums"):
        shares = [row["communication"] / row["seconds"] for row in found[name]]
        result[name] = {
            "communication_share": round(statistics.median(shares), 4),
            "communication_seconds": round(median(name, "communication"), 5),
            "reduced_bytes": int(median(name, "bytes")),
        }
    print(json.dumps(result, indent=1))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"sharded_prototypes_{args.processes}_b{args.batch_size}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--num-prototypes", type=int, default=4096)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(work, (args, store), nprocs=args.processes)


if __name__ == "__main__":
    main()
