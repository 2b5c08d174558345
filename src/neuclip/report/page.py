"""Composes the page: best results, comparison, tables, curves, retrieved images and settings."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from neuclip.evaluation.metric_names import LOG_NORMALIZERS, MAIN_METRICS
from neuclip.evaluation.results import Gallery
from neuclip.report import ReportOptions
from neuclip.report.comparison import (
    all_metrics,
    best_averages,
    best_results,
    comparison,
    different_settings,
    main_splits,
    number,
    percent,
    splits_of,
)
from neuclip.report.entries import Entry, choose_baseline, entries
from neuclip.report.figures import Bars, Curve, curves, grouped, stacked
from neuclip.report.forgetting import Change, changes
from neuclip.report.panels import inline_panels
from neuclip.report.quoted import MEASURES, load_quoted, quoted_for
from neuclip.report.runs import LoadedRun, load_runs
from neuclip.report.scoreboard import PANELS, PanelBar, Scoreboard, average_series, scoreboard
from neuclip.templates import render

PARTS = ("data", "encode", "loss", "normalizer", "backward", "optimizer")
MAIN_DIAGNOSTICS = ("gamma", *LOG_NORMALIZERS)
NO_DIAGNOSTICS = {"step", "epoch", "samples_seen", "seconds", "loss", "temperature", "logit_scale"}


@dataclass(frozen=True)
class Plot:
    """A drawing with its title and a text that describes it."""

    title: str
    svg: Markup
    summary: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """How curves show a run: runs that differ in the seed alone share colour and legend."""

    run: LoadedRun
    color: int
    legend: str

    def curve(self, points: list[tuple[float, float]], *, batch: bool = False) -> Curve:
        """A curve of this run; `batch`: the mini-batch estimate, drawn dotted."""
        if batch:
            return Curve(f"{self.run.label}, mini-batch estimate", self.color, points, dotted=True)
        return Curve(self.run.label, self.color, points, self.legend)


@dataclass(frozen=True)
class RunGallery:
    """A gallery with its run and the number of queries that found a correct image."""

    run: LoadedRun
    gallery: Gallery
    hits: int


@dataclass(frozen=True)
class Page:
    """The page and its comparison; a single run without benchmark results has none."""

    html: str
    board: Scoreboard | None


def compose(run_dirs: list[Path], options: ReportOptions) -> Page:
    """Composes the page about all runs.

    Raises:
        UserError: a folder is not a run folder, or the baseline or training set is unknown.
    """
    runs = load_runs(run_dirs)
    quoted = [] if options.published is None else quoted_for(options.published)
    found = entries(runs)
    board = scoreboard(found, choose_baseline(found, options.baseline), quoted)
    shown = board if board.panels and (len(runs) > 1 or board.of_benchmark) else None
    lines, changed = _lines(runs, found), changes(runs)
    html = render(
        "report.html.j2",
        board=shown,
        panels=[] if shown is None else _panels(shown),
        quoted=quoted,
        all_quoted=load_quoted(),
        measures=MEASURES,
        runs=runs,
        title=_title(runs),
        reload=options.reload,
        best_results=best_averages(board) or best_results(runs, found),
        groups=comparison(runs),
        all_groups=all_metrics(runs),
        changes=changed,
        change_plots=_change_plots(changed),
        percent=percent,
        plots=_main_plots(lines, board),
        more_plots=_more_plots(lines),
        galleries=[(split, _galleries(runs, split)) for split in _gallery_splits(runs)],
        different=different_settings(runs),
    )
    return Page(html, shown)


def _panels(board: Scoreboard) -> list[Plot]:
    """The drawings of the comparison; the text of each describes its bars."""
    return [
        Plot(panel.title, Markup(svg), f"{panel.title}: {'; '.join(map(_described, panel.bars))}.")
        for panel, svg in zip(board.panels, inline_panels(board.panels), strict=True)
    ]


def _described(bar: PanelBar) -> str:
    return f"{bar.label} {bar.why or 'no value' if bar.mean is None else format(bar.mean, '.1%')}"


def _lines(runs: list[LoadedRun], found: list[Entry]) -> list[Line]:
    """The runs in order, with the colour of their entry; the first run of an entry names it."""
    lines: list[Line] = []
    for run in runs:
        color, entry = next(
            (number, entry)
            for number, entry in enumerate(found)
            if run in entry.runs or run in entry.repeats
        )
        several = len(entry.runs) + len(entry.repeats) > 1
        first = run is entry.runs[0]
        lines.append(Line(run, color, (entry.label if first else "") if several else run.label))
    return lines


def _title(runs: list[LoadedRun]) -> str:
    if len(runs) == 1:
        return runs[0].label
    methods = list(dict.fromkeys(run.method for run in runs))
    if len(methods) == 1:
        return f"{len(runs)} runs of {methods[0]}"
    return ", ".join(methods) if len(methods) <= 4 else f"{len(methods)} methods, {len(runs)} runs"


def _main_plots(lines: list[Line], board: Scoreboard) -> list[Plot]:
    runs = [line.run for line in lines]
    return [
        *_train_plot(
            lines, "loss", "Training loss",
            "Different methods have different losses: compare the shapes of the curves here, and "
            "the methods by accuracy.",
        ),
        *_average_plots(lines, board),
        *_accuracy_plots(lines, main_splits(runs)),
        *_normalizer_plots(lines),
        *_train_plot(lines, "temperature", "Temperature"),
        *_diagnostic_plots(lines, main=True),
        *_share_plot(runs),
    ]  # fmt: skip


def _more_plots(lines: list[Line]) -> list[Plot]:
    """Curves of benchmark tasks evaluated during training, and of the remaining records."""
    runs = [line.run for line in lines]
    tasks = [split for split in splits_of(runs) if split not in main_splits(runs)]
    along = [
        task
        for task in tasks
        if any(len({e.epoch for e in r.evaluations if e.split == task}) > 1 for r in runs)
    ]
    return [*_accuracy_plots(lines, along), *_diagnostic_plots(lines, main=False)]


def _train_plot(lines: list[Line], key: str, title: str, note: str = "") -> list[Plot]:
    drawn = [line.curve(line.run.series(key)) for line in lines]
    return _curve_plot(f"train-{key}", drawn, title, note)


def _curve_plot(
    name: str,
    curved: list[Curve],
    title: str,
    note: str = "",
    *,
    percent: bool = False,
    from_zero: bool = False,
) -> list[Plot]:
    """One plot; none if no line has a point."""
    drawn = [line for line in curved if line.points]
    if not drawn:
        return []
    marked = max(len(line.points) for line in drawn) <= 40
    svg = Markup(
        curves(_identifier(name), drawn, percent=percent, marked=marked, from_zero=from_zero)
    )
    ends = "; ".join(_ends(line, percent=percent) for line in drawn)
    return [Plot(title, svg, f"{title} over samples seen. {ends}.", note)]


def _ends(line: Curve, *, percent: bool) -> str:
    first, last = (f"{value:.1%}" if percent else number(value) for value in _tips(line.points))
    return f"{line.label}: from {first} to {last}"


def _tips(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[0][1], points[-1][1]


def _change_plots(changed: list[Change]) -> list[Plot]:
    """Gain on own data, and loss on canaries (dotted), over samples seen."""
    several = len({change.run.label for change in changed}) > 1
    drawn = [
        Curve(
            f"{change.run.label}, {change.split}", color, change.points,
            f"{change.run.label}: {change.split}" if several else change.split,
            dotted=change.canary,
        )
        for color, change in enumerate(changed)
    ]  # fmt: skip
    note = "In percentage points of the main metric. Dotted: what may be forgotten."
    return _curve_plot("changes", drawn, "Change against the starting weights", note)


def _average_plots(lines: list[Line], board: Scoreboard) -> list[Plot]:
    """The benchmark's averages over samples seen, if several checkpoints were evaluated."""
    plots: list[Plot] = []
    for group in PANELS:
        drawn = [line.curve(average_series(board, line.run, group)) for line in lines]
        if any(len(line.points) > 1 for line in drawn):
            plots += _curve_plot(f"average-{group}", drawn, MEASURES[group], percent=True)
    return plots


def _accuracy_plots(lines: list[Line], splits: list[str]) -> list[Plot]:
    plots: list[Plot] = []
    for split in splits:
        for metric in MAIN_METRICS:
            drawn = [line.curve(line.run.eval_series(split, metric.key)) for line in lines]
            title = f"{metric.label}: {split}"
            plot = _curve_plot(f"{metric.key}-{split}", drawn, title, percent=True)
            if plot:
                plots += plot
                break
    return plots


def _normalizer_plots(lines: list[Line]) -> list[Plot]:
    """Curves if the error was measured during training, bars if only at its end."""
    runs, plots = [line.run for line in lines], list[Plot]()
    for split in splits_of(runs):
        title = f"Error of the log-normalizers: {split}"
        drawn = [
            line.curve(
                line.run.eval_series(split, f"{'minibatch_' if batch else ''}normalizer_mae"),
                batch=batch,
            )
            for line in lines
            for batch in (False, True)
        ]
        if any(len(line.points) > 1 for line in drawn):
            note = (
                "Mean absolute error against the exact values. Solid: predicted by the method; "
                "dotted: the mini-batch estimate at the same temperature."
            )
            plots += _curve_plot(f"normalizer-{split}", drawn, title, note, from_zero=True)
        else:
            plots += _normalizer_bars(runs, split, title)
    return plots


def _normalizer_bars(runs: list[LoadedRun], split: str, title: str) -> list[Plot]:
    keys = ("normalizer_mae", "minibatch_normalizer_mae")
    finals = [(run, run.final(split)) for run in runs]
    finals = [(run, final) for run, final in finals if all(key in final for key in keys)]
    if not finals:
        return []
    predicted, batch = ([final[key] for _, final in finals] for key in keys)
    labels = [run.label for run, _ in finals]
    svg = grouped(
        _identifier(f"normalizer-{split}"),
        labels,
        [Bars("predicted by the method", 0, predicted), Bars("mini-batch estimate", -1, batch)],
    )
    summary = "; ".join(
        f"{label}: {number(ours)} predicted, {number(theirs)} by the mini-batch"
        for label, ours, theirs in zip(labels, predicted, batch, strict=True)
    )
    note = "Mean absolute error against the exact values, at each run's own last temperature."
    return [Plot(title, Markup(svg), f"{title}. {summary}.", note)]


def _diagnostic_plots(lines: list[Line], *, main: bool) -> list[Plot]:
    """Other keys of the records: log-normalizers and gamma (`main`), or the rest."""
    keys = dict.fromkeys(key for line in lines for record in line.run.train for key in record)
    plots: list[Plot] = []
    for key in keys:
        if key not in NO_DIAGNOSTICS and _is_main(key) == main:
            plots += _train_plot(lines, key, _words(key))
    return plots


def _words(key: str) -> str:
    words = key.replace("log_normalizer", "log-normalizer").replace("_", " ")
    return words[:1].upper() + words[1:]


def _is_main(key: str) -> bool:
    return key in MAIN_DIAGNOSTICS


def _share_plot(runs: list[LoadedRun]) -> list[Plot]:
    """Shares of the training time; unrecorded time is "other"."""
    keys = {key for run in runs for record in run.train for key in record}
    found = {key.removeprefix("share_") for key in keys if key.startswith("share_")}
    parts = [part for part in PARTS if part in found] + sorted(found - {*PARTS, "other"})
    timed = [run for run in runs if any(run.share(f"share_{part}") is not None for part in parts)]
    if not timed:
        return []
    bars = [
        Bars(part, color, [run.share(f"share_{part}") or 0.0 for run in timed])
        for color, part in enumerate(parts)
    ]
    named = [sum(bar.values[place] for bar in bars) for place in range(len(timed))]
    bars.append(Bars("other", -1, [max(0.0, 1 - total) for total in named]))
    labels = [run.label for run in timed]
    summary = "; ".join(
        f"{label}: " + ", ".join(f"{bar.label} {bar.values[place]:.0%}" for bar in bars)
        for place, label in enumerate(labels)
    )
    title = "Time by section"
    svg = Markup(stacked("time-shares", labels, bars))
    return [Plot(title, svg, f"{title}. {summary}.", "Shares of the training time.")]


def _gallery_splits(runs: list[LoadedRun]) -> list[str]:
    return sorted({split for run in runs for split in run.galleries})


def _galleries(runs: list[LoadedRun], split: str) -> list[RunGallery]:
    """Galleries of a split, the best run's first."""
    owners = [run for run in runs if split in run.galleries]
    owners.sort(key=lambda run: -run.final(split).get("main_metric", 0.0))
    return [
        RunGallery(run, run.galleries[split], _count_hits(run.galleries[split])) for run in owners
    ]


def _count_hits(gallery: Gallery) -> int:
    return sum(any(result.hit for result in query.results) for query in gallery.queries)


def _identifier(words: str) -> str:
    return "".join(_safe(words))


def _safe(words: str) -> Iterable[str]:
    return (letter if letter.isascii() and letter.isalnum() else "-" for letter in words)
