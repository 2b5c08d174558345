"""Evaluations for the processes of the pool, which import this module."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from datacomp_sets import CodedTowers
from neuclip import create_loss
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.sets import open_tasks
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.evaluate import evaluate, evaluate_sets
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.probes import Probes, ProbeSettings
from neuclip.evaluation.split_layouts import PROBED
from neuclip.evaluation.splits import open_split
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import build_clip
from neuclip.model.encoder import Encoder
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main, share_out
from neuclip.training import evaluation_plan

# One more than a batch, so that shares are uneven, and with 3 processes some have none.
SETTINGS = EvaluationSettings(batch_size=24, workers=0)


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


def evaluate_own(folder: Path, name: str, state: dict[str, Any]) -> Any:
    """The evaluation of a split, its features, and the loss's state after predicting."""
    torch.set_num_threads(1)
    towers, loss = encoder(), trained_loss(name, state)
    found = evaluate(EvaluatedModel(towers, loss, 10.0, 20), open_split(folder), SETTINGS)
    encoded = encode_split(towers, start_reading(towers, open_split(folder).index, SETTINGS))
    return found.metrics, encoded, loss.state_dict(), found.gallery


def evaluate_suite(data_dir: Path, results: Path) -> dict[str, dict[str, float]]:
    """The whole suite with towers that know the answers."""
    torch.set_num_threads(1)
    model, settings = EvaluatedModel(CodedTowers()), EvaluationSettings(batch_size=4, workers=0)
    walk = evaluate_sets(model, open_tasks(data_dir, load_suite().select()), settings, results, "c")
    return {done.data.key: done.result.metrics for done in walk}


def refused(data_dir: Path) -> tuple[str, str, str]:
    """Each rank's errors for a corrupt set, a missing set, and work that fails on the last rank."""
    torch.set_num_threads(1)

    def fail(pieces: range) -> list[int]:
        if collectives.rank() == collectives.world_size() - 1:
            raise UserError(f"rank {collectives.rank()} cannot do {list(pieces)}")
        return list(pieces)

    messages: list[str] = []
    task = load_suite().select(["mnist"])
    model, settings = EvaluatedModel(CodedTowers()), EvaluationSettings(batch_size=4, workers=0)
    for work in (
        lambda: evaluate(model, open_tasks(data_dir, task)[0], settings),
        lambda: open_tasks(data_dir, load_suite().select(["cifar10"])),
        lambda: share_out(5, fail),
    ):
        try:
            work()
        except UserError as error:
            messages.append(str(error))
    return messages[0], messages[1], messages[2]


def run(line: list[str]) -> None:
    """A command on every process of the group, with one prompt for each ImageNet class."""
    torch.set_num_threads(1)
    before, evaluation_plan.imagenet_prompts = evaluation_plan.imagenet_prompts, short_prompts
    try:
        assert main(line) == 0
    finally:
        evaluation_plan.imagenet_prompts = before


def short_prompts() -> tuple[list[str], list[str]]:
    """For ImageNet's classes; the real ones take a minute."""
    return [f"number {n}" for n in range(1000)], ["{c}"]


def sharing() -> dict[str, Any]:
    """Results of the helpers that evaluation uses, on each rank."""
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


def probe(folder: Path) -> dict[str, float]:
    """Both probes on a split with a training part, and few-shot."""
    torch.set_num_threads(1)
    towers = encoder()
    settings = ProbeSettings(kinds=("linear", "knn"), neighbours=3, few_shot=(1,), few_shot_seeds=2)
    split = open_split(folder, purpose=PROBED)
    probes = Probes(towers, SETTINGS, settings)
    return evaluate(EvaluatedModel(towers), split, SETTINGS, probes=probes).metrics
