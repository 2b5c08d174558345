"""Compares estimators of the log-normalizer on frozen embeddings of a trained run.

    python -m studies.default.probe --run demo/runs/demo-neuclip --data demo/data/train

The run's encoders embed the training pairs once. For each seed, 4,096 random anchors are compared
with log g over *all* n pairs. Estimators see a batch and a pool of other random pairs, which stands
for the embeddings of recent batches without their drift. The error is estimate - exact. Takes
minutes on a CPU. Writes `normalizer_probe.json` (`--name`) into studies/default/results/.
"""

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.prototypes import NetworkSettings, PrototypeNormalizer
from neuclip.method.notation import Anchors, Pairs
from neuclip.method.objective import mix
from neuclip.method.schedule import Gamma
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_run
from neuclip.parallel.collectives import BatchLayout
from studies.shared.error import encode_training_pairs, exact_of, summary

RESULTS = Path(__file__).parent / "results"
ANCHORS, BATCH, POOL = 4096, 64, 8192
TINY = 1e-30
TRAININGS = (
    ("adagrad_norm", 1.0, 10),
    ("adagrad_norm", 1.0, 1),
    ("adagrad", 1.0, 10),
    ("adagrad", 0.01, 1),
    ("adam", 0.003, 1),
    ("sgd", 1.0, 1),
)
"""Optimiser, learning rate, steps per batch."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--epoch", type=int, help="epoch of the checkpoint; by default the newest")
    parser.add_argument(
        "--only", nargs="+", metavar="START", help="only estimators whose name starts like this"
    )
    parser.add_argument("--name", default="normalizer_probe", help="name of the file of results")
    parser.add_argument("--data", help="training data; by default the run's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="batches that train the prototypes")
    parser.add_argument("--features", type=Path, help="keep the embeddings in this file")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


class Probe:
    """One draw of anchors, batches and pool. The first axis of tensors is the side.

    Attributes:
        anchors: [2, anchors, d].
        own: s_ii / tau of the anchors, [anchors].
        pool: candidates for the anchors of each side, [2, POOL, d].
    """

    def __init__(self, features: Tensor, scale: float, seed: int) -> None:
        self.features, self.scale, self.seed = features, scale, seed
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(features.shape[1], generator=generator)
        self.rows, pool, self.rest = order.split([ANCHORS, POOL, len(order) - ANCHORS - POOL])
        self.anchors, self.pool = features[:, self.rows], features[:, pool].flip(0)
        self.own = (features[0, self.rows] * features[1, self.rows]).sum(-1) * scale
        self.exact = exact_of(features, self.rows, scale, 0.0)
        batches, own = self.rows.split(BATCH), torch.arange(BATCH)
        estimates = [exact_of(features[:, rows], own, scale, 0.0) for rows in batches]
        self.batch = torch.cat(estimates, 1).float()
        self.generator = generator

    def read(self, prototypes: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Log sum_k w_k exp((e_i . W_k - s_ii) / tau), [2, anchors]; by default w = 1/m."""
        logits = torch.bmm(self.anchors, prototypes.transpose(1, 2)) * self.scale
        if log_weights is None:
            return logits.logsumexp(-1) - math.log(prototypes.shape[1]) - self.own
        return (logits + log_weights[:, None]).logsumexp(-1) - self.own

    def first(self, count: int) -> Tensor:
        return self.read(self.pool[:, :count])

    def training_batches(self, steps: int) -> Iterator[Tensor]:
        """Batches of pairs that are neither anchors nor in the pool, [2, BATCH, d]."""
        for _ in range(steps):
            chosen = torch.randint(len(self.rest), (BATCH,), generator=self.generator)
            yield self.features[:, self.rest[chosen]]


# --- choosing prototypes from the pool ---------------------------------------------------------


def kmeans_plus_plus(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` points, each drawn by its squared distance to the points before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = 2 - 2 * points @ points[chosen[0]]
    for _ in range(count - 1):
        weight = distance.clamp_min(0)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        distance = torch.minimum(distance, 2 - 2 * points @ points[chosen[-1]])
    return torch.tensor(chosen)


def log_counts(points: Tensor, centres: Tensor) -> Tensor:
    """Logarithm of the share of points whose nearest centre this is, for each centre."""
    counts = torch.bincount((points @ centres.T).argmax(1), minlength=len(centres))
    return (counts / len(points)).clamp_min(TINY).log()


def lloyd(points: Tensor, centres: Tensor, rounds: int) -> Tensor:
    """Means of the points nearest to each centre; not normalised, so the mean logit is exact."""
    for _ in range(rounds):
        nearest = (points @ torch.nn.functional.normalize(centres, dim=-1).T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def hubness(probe: Probe, side: int, anchors: int = 512) -> Tensor:
    """Share of the softmax weight that each member of the pool attracts, over other anchors."""
    sample = probe.features[side, probe.rest[:anchors]]
    return (sample @ probe.pool[side].T * probe.scale).softmax(-1).mean(0)


def chosen(probe: Probe, count: int, how: str) -> tuple[Tensor, Tensor]:
    """Prototypes [2, count, d] and their log-weights [2, count]."""
    prototypes, weights = [], []
    for side in (0, 1):
        points = probe.pool[side]
        if how.startswith("kmeans"):
            centres = points[kmeans_plus_plus(points, count, probe.generator)]
            if how == "kmeans-lloyd":
                centres = lloyd(points, centres, 5)
                log_weight = log_counts(points, torch.nn.functional.normalize(centres, dim=-1))
            else:
                log_weight = log_counts(points, centres)
            if how == "kmeans-equal":
                log_weight = torch.full((count,), -math.log(count))
        else:
            share = 0.5 * hubness(probe, side) + 0.5 / POOL
            picked = torch.multinomial(share, count, replacement=True, generator=probe.generator)
            centres, log_weight = points[picked], -(share[picked] * POOL * count).log()
            if how == "hard":
                log_weight = torch.full((count,), -math.log(count))
        prototypes.append(centres)
        weights.append(log_weight)
    return torch.stack(prototypes), torch.stack(weights)


# --- training prototypes ------------------------------------------------------------------------


def trained(probe: Probe, count: int, steps: int, **changes: object) -> Tensor:
    """The product's network, started from the pool and trained on batches of frozen pairs."""
    values = {
        "num_prototypes": count, "inner_steps": 10, "restart_steps": 10**9, "prototype_lr": 1.0,
        "prototype_optimizer": "adagrad_norm", "refresh": "restart", "gradient": "detached",
        "restart_from": "earlier", "restart_fill": "pool", "restart_optimizer": True,
        "log_weights": False, **changes,
    }  # fmt: skip
    network = PrototypeNormalizer(
        probe.pool.shape[-1], NetworkSettings(**values), Gamma(0.0, "constant", 1.0, 1), 0.0
    )
    network.ring.push(probe.pool[:, :count])
    network._restart()
    scale = torch.tensor(probe.scale)
    for features in probe.training_batches(steps):
        network.estimate(_as_anchors(features, scale))
    anchors = GlobalBatch(
        features=probe.anchors,
        positive=probe.own / probe.scale,
        logit_scale=scale,
        log_inner=torch.zeros(probe.anchors.shape[:2]),
        epsilon=0.0,
        sample_ids=None,
        groups=None,
        thresholds=None,
    )
    return network._read(anchors).log_mean


def _as_anchors(features: Tensor, scale: Tensor) -> Anchors:
    inner = exact_of(features, torch.arange(features.shape[1]), float(scale), 0.0).float()
    positive = (features[0] * features[1]).sum(-1)
    pairs = Pairs(features, BatchLayout((features.shape[1],), 0))
    return Anchors(pairs, positive, inner, scale, features, negatives=features.shape[1] - 1)


def natural_weights(probe: Probe, count: int, steps: int, rate: float = 0.05) -> Tensor:
    """Log-weights by natural-gradient steps (gradient over weight) of bounded length."""
    prototypes = probe.pool[:, :count]
    log_weights = torch.full((2, count), -math.log(count))
    for features in probe.training_batches(steps):
        logits = torch.bmm(features, prototypes.transpose(1, 2)) * probe.scale
        logits += log_weights[:, None]
        own = (features[0] * features[1]).sum(-1) * probe.scale
        target = exact_of(features, torch.arange(BATCH), probe.scale, 0.0).float()
        slope = 1 - (target - logits.logsumexp(-1) + own).clamp_max(5).exp()
        gradient = (slope[..., None] * logits.softmax(-1)).mean(1)
        log_weights -= (rate * gradient / log_weights.exp().clamp_min(1e-12)).clamp(-1, 1)
        log_weights -= log_weights.logsumexp(-1, keepdim=True)
    return probe.read(prototypes, log_weights)


# --- the table ----------------------------------------------------------------------------------


def estimators(steps: int) -> dict[str, Callable[[Probe], Tensor]]:
    table: dict[str, Callable[[Probe], Tensor]] = {"batch of 64": lambda p: p.batch}
    for m in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        table[f"pool, m {m}"] = lambda p, m=m: p.first(m)
    for gamma in (0.7, 0.4, 0.1):
        table[f"pool 2048 and batch, gamma {gamma}"] = lambda p, g=gamma: mix(
            p.first(2048), p.batch, g
        )
    for m, gamma in ((4096, 0.4), (8192, 0.4), (8192, 0.2), (8192, 0.1)):
        table[f"pool {m} and batch, gamma {gamma}"] = lambda p, m=m, g=gamma: mix(
            p.first(m), p.batch, g
        )
    share = (BATCH - 1) / (BATCH - 1 + 2048)
    table["pool 2048 and batch, by counts"] = lambda p: mix(p.first(2048), p.batch, share)
    for c in (0.0, 3.0, 6.0, 9.0):
        table[f"pool 2048 and batch, gamma of the anchor, c {c:g}"] = lambda p, c=c: by_anchor(
            p.first(2048), p.batch, c
        )
    for how in ("kmeans", "kmeans-equal", "kmeans-lloyd", "importance", "hard"):
        table[f"512 of {POOL}, {how}"] = lambda p, how=how: p.read(*chosen(p, 512, how))
    for kind, lr, inner in TRAININGS:
        table[f"512 trained, {kind} {lr:g}, T_u {inner}"] = partial(
            trained,
            count=512,
            steps=steps,
            prototype_optimizer=kind,
            prototype_lr=lr,
            inner_steps=inner,
        )
    table["512 trained, adagrad 0.01, T_u 1, log-weights"] = lambda p: trained(
        p, 512, steps, prototype_optimizer="adagrad", prototype_lr=0.01, inner_steps=1,
        log_weights=True,
    )  # fmt: skip
    table["2048 trained, adagrad_norm 1, T_u 10"] = lambda p: trained(p, 2048, steps)
    table["512, log-weights by natural gradient"] = lambda p: natural_weights(p, 512, steps)
    return table


def by_anchor(predicted: Tensor, batch: Tensor, offset: float) -> Tensor:
    """SCENT's rate applied to alpha: gamma_i = 1 / (1 + exp(-alpha_i - c))."""
    raised = predicted + offset
    log_sigmoid = torch.nn.functional.logsigmoid
    return torch.logaddexp(predicted + log_sigmoid(-raised), batch + log_sigmoid(raised))


def shown(args: argparse.Namespace) -> list[str]:
    """The flags that decide the numbers; folders are replaced by a word."""
    words = ["--run", "RUN", "--seeds", str(args.seeds), "--steps", str(args.steps)]
    words += [] if args.epoch is None else ["--epoch", str(args.epoch)]
    return words + ([] if args.only is None else ["--only", *args.only])


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    run = load_run(CheckpointChoice(args.run, epoch=args.epoch), "cpu")
    wanted = {
        name: estimate
        for name, estimate in estimators(args.steps).items()
        if args.only is None or name.startswith(tuple(args.only))
    }
    if not wanted:
        raise SystemExit(
            f"--only {args.only}: no such estimator; choose from {list(estimators(0))}"
        )
    if args.features is not None and args.features.exists():
        features = torch.load(args.features, weights_only=True)
    else:
        features, _ = encode_training_pairs(run, args.data)
        if args.features is not None:
            torch.save(features, args.features)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        probe = Probe(features, run.clip.logit_scale, seed)
        for name, estimate in wanted.items():
            found.setdefault(name, []).append(summary("", estimate(probe) - probe.exact))
    rows = {}
    for name, each in found.items():
        rows[name] = {key: round(statistics.mean(e[key] for e in each), 3) for key in each[0]}
        rows[name]["mse_sd"] = round(
            float(torch.tensor([e["mse"] for e in each]).std(correction=0)), 3
        )
        print(f"{name:55} {rows[name]}")
    if not args.no_save:
        result = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "-m", "studies.default.probe", *shown(args)]),
            "machine": f"CPU ({platform.machine()}), 1 thread",
            "run": {"method": run.config.method.model_dump(), "epochs": run.checkpoint.epoch},
            "temperature": 1 / run.clip.logit_scale,
            "pairs": features.shape[1],
            "seeds": args.seeds,
            "steps": args.steps,
            "log_normalizer_error": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
