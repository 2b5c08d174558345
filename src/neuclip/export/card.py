"""The model card: how to load the towers, the recipe, what they saw, and how they were judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from neuclip.catalogue.method_info import MethodInfo
from neuclip.catalogue.registry import method_info
from neuclip.config.run_config import RunConfig
from neuclip.evaluation.datacomp.suite import Average, load_suite
from neuclip.evaluation.metric_names import METRICS
from neuclip.evaluation.results import EvalResult, read_eval_results
from neuclip.model.load import Pretrained

_NO_RECIPE = ("name", "resume", "device", "evaluation", "output")


@dataclass(frozen=True)
class CardText:
    """What the caller says on the card.

    Attributes:
        usage: Code that loads the towers.
        notes: What needs care, in sentences.
        licence: Identifier, if the user gave one.
    """

    usage: str
    notes: list[str]
    licence: str | None


@dataclass(frozen=True)
class _Score:
    name: str
    metric: str
    value: str


def write_card(path: Path, model: Pretrained, text: CardText) -> None:
    """Writes the card; of towers that neuclip did not train it says what is known.

    Raises:
        UserError: the results of the checkpoint cannot be read.
    """
    checkpoint = model.checkpoint
    own, config = checkpoint.own, checkpoint.config
    results = read_eval_results(checkpoint.results) if checkpoint.results.is_file() else []
    environment = Environment(
        loader=PackageLoader("neuclip"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("model_card.md.j2").render(
        name=checkpoint.name or checkpoint.path.stem,
        arch=Path(checkpoint.arch.removeprefix("local-dir:")).name,
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
    """Counts of the training data, from the checkpoint."""
    steps, batch = int(own["step"]), int(own["global_batch_size"])
    damage = own["damage"]
    by_kind = ", ".join(f"{count} {kind}" for kind, count in damage["by_kind"].items())
    # With data_size, the checkpoint has the bound of the sample ids in place of their number.
    whole = [] if config.data.data_size else [("Samples in the data", own["num_samples"])]
    return [
        *((name, f"{int(count):,}") for name, count in whole),
        ("Samples in an epoch", f"{int(own['steps_per_epoch']) * batch:,}"),
        ("Global batch size", f"{batch:,}"),
        ("Steps", f"{steps:,}"),
        ("Epochs", f"{steps / int(own['steps_per_epoch']):.4g}"),
        ("Samples seen", f"{steps * batch:,}"),
        ("Damaged samples met", f"{damage['total']:,}" + (f" ({by_kind})" if by_kind else "")),
    ]


def _settings(config: RunConfig) -> str:
    """The configuration; of places on the machine that trained, the last part only."""
    tree: dict[str, Any] = yaml.safe_load(config.to_yaml())
    kept = {key: _without_place(v) for key, v in tree.items() if key not in _NO_RECIPE}
    return yaml.safe_dump(kept, sort_keys=False).strip()


def _without_place(value: Any) -> Any:  # noqa: ANN401  any plain value
    if isinstance(value, dict):
        return {key: _without_place(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return "::".join(part.rstrip("/").rpartition("/")[2] for part in value.split("::"))
    return value


def _scores(results: list[EvalResult]) -> list[_Score]:
    """Main metric of the benchmark's tasks; of other splits what is usually read first."""
    suite, found = load_suite(), list[_Score]()
    for result in results:
        task = suite.tasks.get(result.key) if result.provenance is not None else None
        if task is not None:
            value = result.metrics["main_metric"]
            found.append(_Score(task.name, task.metric, f"{value:.4f}"))
            continue
        found += [
            _Score(result.dataset, key, f"{result.metrics[key]:.4f}")
            for key in (metric.key for metric in METRICS if metric.card)
            if key in result.metrics
        ]
    return found


def _averages(results: list[EvalResult]) -> list[Average]:
    """The benchmark's averages that are complete."""
    scores = {r.key: r.metrics["main_metric"] for r in results if r.provenance is not None}
    return [found for found in load_suite().averages(scores).values() if found.value is not None]
