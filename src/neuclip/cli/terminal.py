"""What the command line prints: styled on a terminal, plain lines when piped. Imports no torch."""

import json
import sys
import textwrap
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from neuclip.catalogue.registry import CATALOGUE, MethodInfo
from neuclip.cli.flag_table import bounds, default_text, table
from neuclip.evaluation.datacomp.suite import Average, Task
from neuclip.evaluation.metric_names import METRICS


def say(message: str) -> None:
    """One block on standard error."""
    first, *rest = message.splitlines() or [""]
    print("\n".join([f"neuclip: {first}", *(f"  {line}" for line in rest)]), file=sys.stderr)


@contextmanager
def progress() -> Generator[Callable[[str, int, int], None] | None]:
    """A bar for work that reports what it does, how many parts are done, and how many there are."""
    if not sys.stdout.isatty():
        yield None
        return
    with Progress(console=_console(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield advance


def print_metrics(found: Mapping[str, Mapping[str, float]]) -> None:
    """The results of each split, side by side."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for split in found:
        shown.add_column(split, justify="right")
    for metric in METRICS:
        if metric.table and any(metric.key in metrics for metrics in found.values()):
            label = f"{metric.label} ({metric.hint})" if metric.hint else metric.label
            values = [_number(m.get(metric.key), share=metric.percent) for m in found.values()]
            shown.add_row(label, *values)
    _console().print(shown)


def print_benchmark(scores: Iterable[tuple[Task, float]], averages: Iterable[Average]) -> None:
    """Main metric of every task, then the averages; one that is not complete says so."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("task")
    shown.add_column("metric")
    shown.add_column("score", justify="right")
    for task, score in scores:
        shown.add_row(task.name, task.metric, f"{score:.4f}")
    shown.add_row()
    for average in averages:
        part = f"{average.done} of {average.total}"
        if average.value is None:
            refused = " (--partial averages them)" if average.done else ""
            shown.add_row(average.name, f"refused: {part} tasks{refused}", "-")
        else:
            what = f"mean of {average.total}" if not average.missing else f"mean of {part}"
            shown.add_row(average.name, what, f"{average.value:.4f}")
    _console().print(shown)


def _number(value: float | None, *, share: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if share else f"{value:.3f}"


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        _line(f"{name:{width}}{value}", bold=len(name), hang=width)


def print_stages(seconds: Mapping[str, float]) -> None:
    """Time per sample by stage, what one core would do of each stage alone, and its share."""
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


def print_demo(run: Path, epoch: int, page: Path) -> None:
    """The verdict: accuracy on what was never trained on, against guessing."""
    checkpoints, results = run / "checkpoints", run / "eval_results"
    lines = (results / f"epoch_{epoch}_eval_results.jsonl").read_text(encoding="utf-8").splitlines()
    shown = Table(box=None, pad_edge=False)
    shown.add_column("split")
    shown.add_column("top-1", justify="right")
    shown.add_column("chance", justify="right")
    for line in lines:
        record = json.loads(line)
        metrics = record["metrics"]
        top1, chance = (_number(metrics[key], share=True) for key in ("acc1", "chance"))
        shown.add_row(record["key"], top1, chance)
    _console().print(shown)
    print(f"checkpoint  {checkpoints / f'epoch_{epoch}.pt'}")
    print(f"report      {page}")


def print_methods() -> None:
    """The catalogue: a line for each method, what it estimates and keeps, and its paper."""
    width = max(len(info.name) for info in CATALOGUE) + 2
    for info in CATALOGUE:
        _line(f"{info.name:{width}}{info.summary}", bold=len(info.name), hang=width)
        for fact in (f"normalizer: {info.normalizer}", f"state: {info.state}", info.paper):
            _line(" " * width + fact, hang=width)
    _line("\nneuclip methods NAME shows the formula and the settings of one.")


def print_method(info: MethodInfo) -> None:
    """One method: formula, settings and paper."""
    _line(f"{info.name}: {info.summary}", bold=len(info.name))
    _line("\nFormula", bold=8)
    for line in info.formula.splitlines():
        _console().print(Text(line), soft_wrap=True)
    _line(f"\n  normalizer: {info.normalizer}", hang=4)
    _line(f"  state: {info.state}", hang=4)
    _line("\nSettings (default; range)", bold=9)
    for flag in table():
        if flag.path[0] == "method" and info.name in flag.fields:
            field = flag.fields[info.name]
            values = "; ".join(filter(None, [default_text(field), bounds(field)]))
            flags = ", ".join(flag.names_for(info.name))
            _line(f"  {flag.path[1]} = {values}", bold=2 + len(flag.path[1]))
            _line(f"      {field.description or ''}", hang=6)
            _line(f"      {flags}", hang=6)
    _line("\nPaper", bold=6)
    _line(f"  {info.paper}", hang=2)


def _line(text: str, *, bold: int = 0, hang: int = 0) -> None:
    """One paragraph, its first `bold` characters bold; broken only on a terminal."""
    console = _console()
    if console.is_terminal:
        body = text.lstrip("\n")
        indent = " " * (len(body) - len(body.lstrip()))
        wrapped = textwrap.wrap(
            body.lstrip(), console.width, initial_indent=indent, subsequent_indent=" " * hang
        )
        text = text[: len(text) - len(body)] + "\n".join(wrapped)
    styled = Text(text)
    styled.stylize("bold", 0, bold)
    console.print(styled, soft_wrap=True)


def _console() -> Console:
    """A terminal's own width and style; piped, plain lines that are not broken."""
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, markup=False, width=width)
