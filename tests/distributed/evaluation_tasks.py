"""How the processes of the pool judge; imported by them."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from datacomp_sets import CodedTowers
from neuclip import create_loss
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.benchmark import Benchmark, BenchmarkSettings
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.datacomp.suite_run import open_sets, run_benchmark
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.split_evaluation import JudgeSettings, judge_split
from neuclip.evaluation.splits import open_split
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import build_clip
from neuclip.model.encoder import Encoder
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main, share_out
from neuclip.training import evaluating

# One more than a batch, so that shares are uneven, and with 3 processes some have none.
SETTINGS = JudgeSettings(batch_size=24, workers=0, normalizer_batch_size=20)


def encoder() -> Encoder:
    """Real towers with the same random weights everywhere."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    return Encoder(build_clip("glyph-tiny", "fp32", device), device)


def trained_loss(name: str, state: dict[str, Any] | None = None) -> PairLoss:
    """A loss that saw some batches, or has the state of one."""
    mixing = {"gamma": 0.5, "gamma_schedule": "constant"}
    pool = {"pool_size": 7, **mixing}
    settings = {"neuclip_pool": pool, "fastclip_v3": mixing}.get(name, {})
    dim = encoder().encode_text(encoder().tokenize(["a"])).shape[1]
    loss = create_loss(name, embed_dim=dim, steps_per_epoch=2, num_samples=40, **settings)
    if state is not None:
        loss.load_state_dict(state)
        return loss
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        features = functional.normalize(torch.randn(2, 10, dim, generator=generator), dim=-1)
        ids = torch.arange(10) + 10 * step
        loss(*features, torch.tensor(10.0), torch.tensor(-10.0), sample_ids=ids)
    return loss


def judge(folder: Path, name: str, state: dict[str, Any], gallery: Path) -> Any:
    """Metrics of a split, the features they come from, and what predicting left of the loss."""
    torch.set_num_threads(1)
    towers, loss = encoder(), trained_loss(name, state)
    own = gallery.with_suffix(f".{collectives.rank()}")
    metrics = judge_split(towers, folder, SETTINGS, loss, logit_scale=10.0, gallery=own)
    encoded = encode_split(towers, start_reading(towers, open_split(folder).index, 24, 0))
    return metrics, encoded, loss.state_dict(), own.exists()


def judge_suite(data_dir: Path, results: Path) -> dict[str, dict[str, float]]:
    """The whole suite with towers that know the answers."""
    torch.set_num_threads(1)
    benchmark = Benchmark(CodedTowers(), BenchmarkSettings(batch_size=4, workers=0))
    sets = open_sets(data_dir, load_suite().select())
    found = run_benchmark(benchmark, sets, "c", results)
    return {key: result.metrics for key, result in found.items()}


def refused(data_dir: Path) -> tuple[str, str, str]:
    """What each process says of a damaged set, and of work that fails on the last one only."""
    torch.set_num_threads(1)

    def fail(pieces: range) -> list[int]:
        if collectives.rank() == collectives.world_size() - 1:
            raise UserError(f"rank {collectives.rank()} cannot do {list(pieces)}")
        return list(pieces)

    said: list[str] = []
    task = load_suite().select(["mnist"])
    benchmark = Benchmark(CodedTowers(), BenchmarkSettings(batch_size=4, workers=0))
    for work in (
        lambda: benchmark.judge(open_sets(data_dir, task)[0]),
        lambda: open_sets(data_dir, load_suite().select(["cifar10"])),
        lambda: share_out(5, fail),
    ):
        try:
            work()
        except UserError as error:
            said.append(str(error))
    return said[0], said[1], said[2]


def run(line: list[str]) -> None:
    """A command on every process of the group, with one prompt for each ImageNet class."""
    torch.set_num_threads(1)
    before, evaluating.imagenet_prompts = evaluating.imagenet_prompts, short_prompts
    try:
        assert main(line) == 0
    finally:
        evaluating.imagenet_prompts = before


def short_prompts() -> tuple[list[str], list[str]]:
    """For ImageNet's classes; the real ones take a minute."""
    return [f"number {n}" for n in range(1000)], ["{c}"]


def sharing() -> dict[str, Any]:
    """The helpers that judging rests on, as each process sees them."""
    rank = collectives.rank()
    with collectives.alone():
        alone = (collectives.world_size(), collectives.rank(), collectives.is_main())
    return {
        "objects": collectives.gather_objects({"rank": rank, "tensor": torch.full((rank,), rank)}),
        "shared": share_out(5, lambda pieces: [(n, rank) for n in pieces]),
        "none": share_out(0, list),
        "main": from_main(lambda: f"made by {rank}"),
        "alone": alone,
        "after": collectives.world_size(),
    }
