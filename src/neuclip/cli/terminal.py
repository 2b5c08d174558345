"""What the command line prints: styled on a terminal, plain lines when piped. Imports no torch."""

import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuclip import console
from neuclip.errors import without_controls
from neuclip.evaluation.blend_choice import Mix
from neuclip.evaluation.datacomp.suite import Average, Task
from neuclip.evaluation.metric_names import Metric, shown_metrics
from neuclip.evaluation.results import EvalResult, read_eval_results
from neuclip.run_folder import RunFolder

if TYPE_CHECKING:
    from neuclip.report.run_list import ListedRun

progress = console.progress


def say(message: str) -> None:
    """Prints a message on standard error."""
    first, *rest = message.splitlines() or [""]
    console.write("\n".join([f"neuclip: {first}", *(f"  {line}" for line in rest)]))


def print_metrics(found: Mapping[str, EvalResult]) -> None:
    """Prints the metrics of each split, side by side."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for split in found:
        shown.add_column(without_controls(split), justify="right")
    metrics_of = [result.metrics for result in found.values()]
    for key, label in (("num_samples", "Samples"), ("num_captions", "Captions")):
        if key == "num_samples" or any(key in metrics for metrics in metrics_of):
            counts = [m.get(key) for m in metrics_of]
            shown.add_row(label, *("-" if n is None else f"{int(n):,}" for n in counts))
    for metric in shown_metrics({key for metrics in metrics_of for key in metrics}):
        if metric.table and any(metric.key in metrics for metrics in metrics_of):
            label = f"{metric.label} ({metric.hint})" if metric.hint else metric.label
            values = [_number(m.get(metric.key), share=metric.percent) for m in metrics_of]
            shown.add_row(label, *values)
    _console().print(shown)


def print_benchmark(scores: Iterable[tuple[Task, float]], averages: Iterable[Average]) -> None:
    """Prints the main metric of each task, then the averages that have a value.

    A partial average says of how many tasks it is the mean.
    """
    shown = Table(box=None, pad_edge=False)
    shown.add_column("task")
    shown.add_column("metric")
    shown.add_column("score", justify="right")
    for task, score in scores:
        shown.add_row(task.name, task.metric, f"{score:.4f}")
    complete = [average for average in averages if average.value is not None]
    if complete:
        shown.add_row()
    for average in complete:
        missing = f"{average.done} of " if average.missing else ""
        shown.add_row(average.name, f"mean of {missing}{average.total}", f"{average.value:.4f}")
    _console().print(shown)


def print_probes(results: Sequence[tuple[Task, EvalResult]]) -> None:
    """Prints the metrics of probes of each task that has some: by its main metric where it has it.

    A few-shot value comes with its standard deviation.
    """
    metrics_of = [(task, result.metrics) for task, result in results]
    keys = {key for _, metrics in metrics_of for key in metrics}
    columns = [
        metric
        for metric in shown_metrics(keys)
        if metric.key in keys and _PROBE_COLUMN.fullmatch(metric.key)
    ]
    shown = Table(box=None, pad_edge=False)
    shown.add_column("task")
    shown.add_column("metric")
    shown.add_column("samples", justify="right")
    for metric in columns:
        shown.add_column(metric.label.replace(" top-1", ""), justify="right")
    for task, metrics in metrics_of:
        samples = f"{int(metrics['num_probe_samples']):,}"
        values = [_of_task(metric, task, metrics) for metric in columns]
        shown.add_row(task.name, task.metric, samples, *values)
    _console().print(shown)


_PROBE_COLUMN = re.compile(r"(linear_probe|knn)_(\d+shot_)?acc1")


def _of_task(metric: Metric, task: Task, metrics: Mapping[str, float]) -> str:
    """The task's main metric in place of `acc1`."""
    key = metric.key.removesuffix("acc1") + task.metric
    if key not in metrics:
        return "-"
    spread = metrics.get(f"{key}_std")
    return f"{metrics[key]:.4f}" + ("" if spread is None else f" +- {spread:.4f}")


def print_mixes(mixes: Sequence[Mix], chosen: Mix) -> None:
    """Prints the results of mixes by alpha, with differences to the old model if it is there."""
    with_canary = chosen.canary is not None
    start = next((mix for mix in mixes if mix.alpha == 0), None)
    shown = Table(box=None, pad_edge=False)
    for head in ("alpha", "own data", *(("canary", "mean") if with_canary else ())):
        shown.add_column(head, justify="right")
        if start is not None and head in {"own data", "canary"}:
            shown.add_column("vs OLD", justify="right")
    shown.add_column("")
    for mix in mixes:
        row = [f"{mix.alpha:g}"]
        for value, before in (
            (mix.own, None if start is None else start.own),
            (mix.canary, None if start is None else start.canary),
        ):
            if value is not None:
                row.append(_number(value, share=True))
                row += [] if before is None else [f"{100 * (value - before):+.2f}"]
        row += [] if mix.mean is None else [_number(mix.mean, share=True)]
        shown.add_row(*row, "<- chosen" if mix == chosen else "")
    _console().print(shown)


def _number(value: float | None, *, share: bool) -> str:
    if value is None:
        return "-"
    if share:
        return f"{100 * value:.2f} %"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints names and values, one pair per line."""
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        print_line(f"{name:{width}}{value}", bold=len(name), hang=width)


def print_reasons(rows: Iterable[tuple[str, str, str]]) -> None:
    """Prints settings with their values and reasons; a reason wraps within its column."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("setting", no_wrap=True)
    shown.add_column("value", overflow="fold")
    shown.add_column("why")
    for row in rows:
        shown.add_row(*map(without_controls, row))
    _console().print(shown)


def print_runs(runs: "Iterable[ListedRun]") -> None:
    """Prints runs, one per line."""
    shown = Table(box=None, pad_edge=False)
    for head in ("run", "method", "data", "progress", "best", "state"):
        shown.add_column(head, overflow="fold")
    for run in runs:
        row = (run.name, run.method, run.data, run.progress, run.best or "-", run.state)
        shown.add_row(*map(without_controls, row))
    _console().print(shown)


def print_stages(seconds: Mapping[str, float]) -> None:
    """Prints for each stage its time per sample, its speed alone on one core, and its share."""
    total = sum(seconds.values())
    shown = Table(box=None, pad_edge=False)
    shown.add_column("stage")
    for head in ("ms per sample", "samples/s alone", "share"):
        shown.add_column(head, justify="right")
    for stage, value in seconds.items():
        alone = f"{1 / value:,.0f}" if value else "-"
        shown.add_row(stage, f"{1000 * value:.3f}", alone, f"{value / total:.1%}")
    shown.add_row("all", f"{1000 * total:.3f}", f"{1 / total:,.0f}", "")
    _console().print(shown)


def print_demo(run: RunFolder, epoch: int, page: Path) -> None:
    """Prints accuracy and chance on the held-out splits, and the files of the run."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("split")
    shown.add_column("top-1", justify="right")
    shown.add_column("chance", justify="right")
    for result in read_eval_results(run.results(epoch)):
        values = (_number(result.metrics[key], share=True) for key in ("acc1", "chance"))
        shown.add_row(without_controls(result.key), *values)
    _console().print(shown)
    print(f"checkpoint  {run.epoch_checkpoint(epoch)}")
    print(f"report      {page}")


def print_line(text: str, *, bold: int = 0, hang: int = 0) -> None:
    """Prints a paragraph with its first `bold` characters bold; wraps it on a terminal only."""
    text = without_controls(text)
    out = _console()
    if out.is_terminal:
        body = text.lstrip("\n")
        indent = " " * (len(body) - len(body.lstrip()))
        wrapped = textwrap.wrap(
            body.lstrip(), out.width, initial_indent=indent, subsequent_indent=" " * hang
        )
        text = text[: len(text) - len(body)] + "\n".join(wrapped)
    styled = Text(text)
    styled.stylize("bold", 0, bold)
    out.print(styled, soft_wrap=True)


def print_plain(text: str) -> None:
    """Prints one line as it is."""
    _console().print(Text(without_controls(text)), soft_wrap=True)


def _console() -> Console:
    """A console with the terminal's width and style; piped output is plain and unwrapped."""
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, markup=False, width=width)
