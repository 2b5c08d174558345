"""The study's plan with encoders a hundred times cheaper, to select what to train at full size.

    python -m studies.default.small --data demo-data --out study-small
    python -m studies.default.run report --results study-small/results.jsonl

Each encoder has one hidden layer: over the 32 x 32 grey pixels, and over the bag of the caption's
tokens. The data stay in memory, without augmentation. Losses, optimiser, schedule, order of the
data and evaluation are the product's; the loop is not. All stages run for 6 epochs (280,680
samples). The file of results has the format of `run.py` and is resumed in the same way.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.config.resolve import resolve
from neuclip.data.batch import Batch
from neuclip.data.loader import LoaderSettings, evaluation_loader, evaluation_requests
from neuclip.data.opening import open_source
from neuclip.data.order import Order
from neuclip.data.sources.source import Source
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split
from neuclip.evaluation.retrieval import retrieve
from neuclip.evaluation.splits import open_split
from neuclip.evaluation.zero_shot import OWN_RULES, class_vectors, classify, zero_shot_metrics
from neuclip.model.clip import build_clip, clamp_logit_scale
from neuclip.training.optim import Optimizer
from studies.default.data import SPLITS, data_digest
from studies.default.plan import LONG, SEEDS, Cell, plan
from studies.default.rows import results_file
from studies.shared.cell_process import EVALUATED, facts
from studies.shared.error import error_of
from studies.shared.folder_lock import lock
from studies.shared.results_file import ResultsFile
from studies.shared.runner import say

WIDTH, DIM, EPOCHS, EVALUATIONS, ANCHORS = 256, 128, 6, 2, 1024


def grey(image: Image.Image) -> Tensor:
    """Grey pixels as a tensor [3, 32, 32] in -1 ... 1, repeated over the three channels."""
    pixels = torch.from_numpy(np.array(image.convert("L"))).float() / 127.5 - 1
    return pixels.expand(3, -1, -1)


class Towers(nn.Module):
    """Both encoders, with open_clip's names for temperature and bias."""

    def __init__(self, vocabulary: int, settings: MethodSettings) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, WIDTH), nn.GELU(), nn.Linear(WIDTH, DIM)
        )
        self.words = nn.EmbeddingBag(vocabulary, WIDTH, padding_idx=0, mode="mean")
        self.text = nn.Sequential(nn.GELU(), nn.Linear(WIDTH, DIM))
        nn.init.normal_(self.words.weight, std=1.0)
        self.logit_scale = nn.Parameter(-torch.tensor(settings.temperature).log())
        bias = settings.model_dump().get("logit_bias")
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        found = {
            "image_features": self.encode_image(images),
            "text_features": self.encode_text(tokens),
            "logit_scale": self.logit_scale.exp(),
        }
        return found if self.logit_bias is None else {**found, "logit_bias": self.logit_bias}

    def encode_image(self, images: Tensor) -> Tensor:
        return normalize(self.image(images[:, :1]), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return normalize(self.text(self.words(tokens)), dim=-1)


class Tokens:
    """The product's tokens, renumbered to the tokens that occur; all others become padding."""

    def __init__(self, tokenize, captions: list[str]) -> None:
        self.tokenize = tokenize
        known = tokenize(captions).unique()
        self.number = torch.zeros(int(known.max()) + 1, dtype=torch.int64)
        self.number[known[known != 0]] = torch.arange(1, int((known != 0).sum()) + 1)
        self.size = int(self.number.max()) + 1

    def __call__(self, texts: list[str]) -> Tensor:
        tokens = self.tokenize(texts)
        last = len(self.number) - 1
        return torch.where(tokens <= last, self.number[tokens.clamp_max(last)], 0)


class Encoder:
    """The encoders as the evaluation calls them."""

    device = torch.device("cpu")
    transform = staticmethod(grey)

    def __init__(self, towers: Towers, tokenize: Tokens) -> None:
        self.encode_image = torch.no_grad()(towers.encode_image)
        self.encode_text = torch.no_grad()(towers.encode_text)
        self.tokenize = tokenize


def read(source: Source, tokenize: Tokens) -> list[Batch]:
    """All batches of a source, in order."""
    requests = evaluation_requests(np.arange(len(source), dtype=np.int64), 1024)
    return [
        batch for batch in evaluation_loader(
            source, grey, tokenize, requests, LoaderSettings(256)
        )
        if isinstance(batch, Batch)
    ]  # fmt: skip


class Data:
    """All training pairs and splits, in memory."""

    def __init__(self, folder: Path) -> None:
        self.digest = data_digest(folder)
        self.source = open_source(str(folder / "train"))
        captions = [self.source.content(position).caption for position in range(len(self.source))]
        tokenize = build_clip("glyph-tiny", "fp32", torch.device("cpu")).tokenize
        self.tokenize = Tokens(tokenize, captions)
        batches = read(self.source, self.tokenize)
        self.images = torch.cat([batch.images[:, :1] for batch in batches])
        self.tokens = torch.cat([batch.tokens for batch in batches])
        self.splits = [open_split(folder / name) for name in SPLITS]
        self.batches: list[list[Batch]] = [
            read(split.index, self.tokenize) for split in self.splits
        ]


class SmallRun:
    """One run; all of its randomness comes from the cell's seed."""

    def __init__(self, cell: Cell, data: Data) -> None:
        self.cell, self.data = cell, data
        config = resolve(cell.config(Path("unused"), Path("unused")), 1)
        torch.manual_seed(cell.seed)
        self.towers = Towers(data.tokenize.size, config.method)
        self.steps = cell.samples // cell.batch
        self.loss = build_loss(
            config.method, RunFacts(DIM, self.steps, num_samples=len(data.images))
        )
        self.towers.logit_scale.requires_grad_(self.loss.learns_temperature)
        self.optimizer = Optimizer(self.towers, config.optim, cell.epochs * self.steps)
        self.order = Order(data.source.layout, cell.seed)
        self.step = 0

    def train(self) -> dict[str, object]:
        """Trains and returns the run's part of a row."""
        evaluations, trained, errors = [], [], []
        every = self.cell.epochs // EVALUATIONS if self.cell.measures else self.cell.epochs
        for epoch in range(1, self.cell.epochs + 1):
            loss = self._epoch(epoch - 1)
            where = {"epoch": float(epoch), "samples_seen": self.step * self.cell.batch}
            trained.append({**where, "loss": loss, "temperature": self.temperature})
            if not math.isfinite(loss):
                return {"failed": f"the loss is {loss} in epoch {epoch}", "training": trained}
            if epoch % every == 0:
                evaluations += [{**where, **found} for found in self._evaluate()]
                errors.append({**where, "temperature": self.temperature, **self._error()})
        return {"evaluations": evaluations, "training": trained, "errors": errors}

    @property
    def temperature(self) -> float:
        return float((-self.towers.logit_scale.detach()).exp())

    def _epoch(self, epoch: int) -> float:
        """Trains one epoch; returns its last loss, or the first non-finite one."""
        places = self.order.positions(epoch, 0, len(self.data.images))
        positions = torch.from_numpy(places[places < self.cell.samples])
        value = math.nan
        for rows in positions.split(self.cell.batch)[: self.steps]:
            self.optimizer.set_rates(self.step)
            outputs = self.towers(self.data.images[rows], self.data.tokens[rows])
            loss = self.loss(**outputs, sample_ids=rows)
            value = float(loss.detach())
            if not math.isfinite(value):
                break
            loss.backward()
            self.optimizer.step(skip=torch.zeros(()))
            clamp_logit_scale(self.towers)
            self.step += 1
        return value

    def _evaluate(self) -> Iterator[dict[str, object]]:
        encoder = Encoder(self.towers, self.data.tokenize)
        for split, batches in zip(self.data.splits, self.data.batches, strict=True):
            encoded = encode_split(encoder, batches)
            vectors = class_vectors(encoder, split.classnames, split.templates, 4096)
            metrics = zero_shot_metrics(classify(encoded, vectors, split.classnames, OWN_RULES))
            metrics |= retrieve(encoded, OWN_RULES.ties).metrics()
            kept = {key: round(metrics[key], 5) for key in EVALUATED if key in metrics}
            yield {"split": split.name, **kept}

    @torch.no_grad()
    def _error(self) -> dict[str, float]:
        images, tokens = (t[: self.cell.samples] for t in (self.data.images, self.data.tokens))
        features = [self.towers.encode_image(images), self.towers.encode_text(tokens)]
        ids = torch.arange(self.cell.samples)
        scale = 1 / self.temperature
        return error_of(torch.stack(features), ids, self.loss, scale, self.cell.batch, ANCHORS)


def small_plan(rows: Mapping[str, Mapping[str, object]]) -> list[Cell]:
    """The plan with runs of one length, and the same seeds for ingredients and final runs."""
    known = plan(rows, SEEDS)
    return [
        dataclasses.replace(cell, epochs=cell.epochs if cell.stage == "size" else EPOCHS)
        for cell in known
        if not (cell.stage == "batch" and cell.epochs != LONG) and cell.stage != "long-ingredient"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--same-code", nargs="+", default=[], metavar="DIGEST")
    parser.add_argument("--limit", type=int, help="stop after this number of runs")
    parser.add_argument("--labels", nargs="+", help="only these methods and ingredients")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data = Data(args.data)
        results = results_file(args.out / "results.jsonl", data.digest, args.same_code)
        with lock(args.out):
            work(results, data, args.limit, args.labels)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def work(results: ResultsFile, data: Data, limit: int | None, labels: Sequence[str] | None) -> None:
    """Runs the open cells one after the other, at most `limit` of them."""
    done = 0
    while limit is None or done < limit:
        rows = results.read()
        wanted = [cell for cell in small_plan(rows) if not labels or cell.label in labels]
        waiting = [cell for cell in wanted if cell.name not in rows]
        if not waiting:
            return
        cell, start = waiting[0], time.process_time()
        found = SmallRun(cell, data).train()
        row = {"data": data.digest, "towers": "small", **dataclasses.asdict(cell)}
        row |= {"cell": cell.name, **facts(), **found}
        results.append({**row, "cpu_seconds": round(time.process_time() - start, 1)})
        ends = [f"{100 * each['acc1']:.1f}" for each in found.get("evaluations", [])[-2:]]
        say(f"{cell.name}: {ends or found.get('failed')}, {row['date']}")
        done += 1


if __name__ == "__main__":
    sys.exit(main())
