"""The model card: how to load the towers, recipe, training data and results."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neuclip.catalogue.method_info import MethodInfo
from neuclip.catalogue.registry import method_info
from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.config.run_config import RunConfig
from neuclip.evaluation.datacomp.suite import Average, load_suite
from neuclip.evaluation.metric_names import METRICS
from neuclip.evaluation.results import EvalResult, read_eval_results
from neuclip.model.load import Pretrained
from neuclip.templates import render

_NO_RECIPE = ("name", "resume", "device", "evaluation", "output")


@dataclass(frozen=True)
class CardText:
    """Text for the card from the caller.

    Attributes:
        usage: code that loads the towers.
        notes: caveats, as sentences.
        licence: licence identifier; none: the card states none.
        record: the files of the export with their sizes, for a later export.
    """

    usage: str
    notes: list[str]
    licence: str | None
    record: str


@dataclass(frozen=True)
class _CardRow:
    name: str
    metric: str
    value: str


def write_card(path: Path, model: Pretrained, text: CardText) -> None:
    """Writes the card; towers that neuclip did not train get no recipe and no data.

    Raises:
        UserError: the results of the checkpoint cannot be read.
    """
    checkpoint = model.checkpoint
    own, config = checkpoint.own, checkpoint.config
    results = read_eval_results(checkpoint.results) if checkpoint.results.is_file() else []
    card = render(
        "model_card.md.j2",
        name=checkpoint.name or checkpoint.path.stem,
        arch=checkpoint.architecture.short_name,
        sha256=model.sha256,
        text=text,
        config=config,
        method=None if config is None else _method(config),
        facts=[] if own is None or config is None else _facts(own, config),
        settings="" if config is None else _settings(config),
        scores=_scores(results),
        averages=_averages(results),
    )
    path.write_text(card, encoding="utf-8")


def _method(config: RunConfig) -> MethodInfo:
    return method_info(config.method.method)


def _facts(own: Mapping[str, Any], config: RunConfig) -> list[tuple[str, str]]:
    """Counts of training data, batches and steps, from the checkpoint."""
    steps, batch = int(own["step"]), int(own["global_batch_size"])
    damage = own["damage"]
    by_kind = ", ".join(f"{count} {kind}" for kind, count in damage["by_kind"].items())
    # With data_size, num_samples is the bound of the sample ids, not the number of samples.
    known = [] if config.data.data_size else [("Samples in the data", own["num_samples"])]
    return [
        *((name, f"{int(count):,}") for name, count in known),
        ("Samples in an epoch", f"{int(own['steps_per_epoch']) * batch:,}"),
        ("Global batch size", f"{batch:,}"),
        ("Steps", f"{steps:,}"),
        ("Epochs", f"{steps / int(own['steps_per_epoch']):.4g}"),
        ("Samples seen", f"{steps * batch:,}"),
        ("Corrupt samples", f"{damage['total']:,}" + (f" ({by_kind})" if by_kind else "")),
    ]


def _settings(config: RunConfig) -> str:
    """The configuration; paths are reduced to their last part."""
    tree: dict[str, Any] = read_yaml_text(config.to_yaml(), "the settings")
    kept = {key: _without_place(v) for key, v in tree.items() if key not in _NO_RECIPE}
    return yaml.safe_dump(kept, sort_keys=False).strip()


def _without_place(value: Any) -> Any:  # noqa: ANN401  any plain value
    if isinstance(value, dict):
        return {key: _without_place(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return "::".join(part.rstrip("/").rpartition("/")[2] for part in value.split("::"))
    return value


def _scores(results: list[EvalResult]) -> list[_CardRow]:
    """The main metric of benchmark tasks; the most common metrics of other splits."""
    suite, found = load_suite(), list[_CardRow]()
    for result in results:
        task = suite.tasks.get(result.key) if result.provenance is not None else None
        if task is not None:
            value = result.metrics["main_metric"]
            found.append(_CardRow(task.name, task.metric, f"{value:.4f}"))
            continue
        found += [
            _CardRow(result.dataset, key, f"{result.metrics[key]:.4f}")
            for key in (metric.key for metric in METRICS if metric.card)
            if key in result.metrics
        ]
    return found


def _averages(results: list[EvalResult]) -> list[Average]:
    """The benchmark's complete averages."""
    scores = {r.key: r.metrics["main_metric"] for r in results if r.provenance is not None}
    return [found for found in load_suite().averages(scores).values() if found.value is not None]
