"""Tables of the study of fine-tuning: choices by development splits, then the test splits."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.finetuning.cells import LION, RATE, has_rho, plan, stages
from studies.shared.compare import difference, in_points

Row = Mapping[str, Any]
Compared = dict[tuple[str, ...], tuple[list[Row], list[Row]]]
"""Rows of two kinds of runs, by what the table says of them."""

CHOICES = (
    ("Rates and temperature", "rate", ("method", "lr", "rho")),
    ("Remedies", "remedies", ("method", "rho", "mask", "apart", "warm", "more")),
    ("Methods", "methods", ("pairs", "duplicates", "method", "mask")),
    ("Batch", "batch", ("batch", "method")),
    ("Weights of temperature 0.01", "sharp", ("method", "rho")),
    ("Optimiser", "optimiser", ("method", "lr", "more")),
)
"""Title, stage, and what varies in it."""


def tables(rows: Mapping[str, Row]) -> str:
    """All tables as Markdown; the last has the accuracies on test splits.

    Args:
        rows: the rows of the study, by the name of their cell.
    """
    if not rows:
        return "no finished cells"
    hours = sum(row.get("seconds", 0) for row in rows.values()) / 3600
    found = [f"{len(rows)} of {len(list(plan()))} cells, {hours:.1f} hours"]
    for title, stage, keys in CHOICES:
        names = {cell.name for cell in stages() if cell.stage == stage}
        ran = [row for name, row in rows.items() if name in names]
        found.append(_table(title, ran, keys, "development"))
    tested = [row for row in rows.values() if _plain(row)]
    usual = [row for row in tested if row["batch"] == 32]
    found.append(_table("Test splits", usual, ("pairs", "duplicates", "method", "mask"), "test"))
    found += [_less(method, tested) for method in ("openclip", "neuclip_pool")]
    found += [_masked(tested), _lion(list(rows.values()))]
    return "\n\n".join(filter(None, found))


def _less(base: str, rows: Sequence[Row]) -> str:
    """Each method without mask less one of them: by pairs and batch, and all."""
    without = [row for row in rows if not row["mask"]]
    compared: Compared = {}
    for method in sorted({row["method"] for row in without} - {base}):
        both = [[row for row in without if row["method"] == name] for name in (method, base)]
        for pairs, batch in sorted({(row["pairs"], row["batch"]) for row in both[0]}):
            mine, other = (_of(side, {"pairs": pairs, "batch": batch}) for side in both)
            compared[method, f"{pairs:,}", str(batch)] = mine, other
        compared[method, "all", "all"] = both[0], both[1]
    return _differences(f"Less {base}, paired runs", ("method", "pairs", "batch"), compared)


def _masked(rows: Sequence[Row]) -> str:
    """Each method with the mask less the same without, by pairs and where captions are shared."""
    compared: Compared = {}
    masked = {(row["method"], row["pairs"], row["duplicates"]) for row in rows if row["mask"]}
    for method, pairs, duplicates in sorted(masked):
        setting = {"method": method, "pairs": pairs, "duplicates": duplicates, "batch": 32}
        mine, without = (_of(rows, {**setting, "mask": mask}) for mask in (True, False))
        compared[method, f"{pairs:,}", str(duplicates)] = mine, without
    return _differences("Mask less no mask, paired runs", ("method", "pairs", "shared"), compared)


def _lion(rows: Sequence[Row]) -> str:
    """Lion less AdamW, of runs that differ in nothing else but rate and decay."""
    lion = [row for row in rows if row.get("more") in LION.values()]
    compared: Compared = {}
    for method, pairs, lr in sorted({(row["method"], row["pairs"], row["lr"]) for row in lion}):
        setting = {"method": method, "pairs": pairs}
        adamw = _of([row for row in rows if _plain(row)], {**setting, "mask": False})
        compared[method, f"{pairs:,}", f"{lr:g}"] = _of(lion, {**setting, "lr": lr}), adamw
    return _differences("Lion less AdamW, paired runs", ("method", "pairs", "lr"), compared)


def _of(rows: Sequence[Row], setting: Mapping[str, Any]) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in setting.items())]


def _differences(title: str, head: Sequence[str], compared: Compared) -> str:
    """Mean differences in points with 95 % intervals, of the mean over the emoji, and of icons."""
    lines = []
    for key, sides in compared.items():
        found = [
            difference(*({_pair_of(row): _mean(row, part) for row in side} for side in sides))
            for part in ("development", "test", "known")
        ]
        if found[0] is not None:
            cells = [*key, str(found[0].seeds), *(in_points(each) for each in found if each)]
            lines.append(f"| {' | '.join(cells)} |")
    columns = [*head, "pairs of runs", "development", "test", "icons"]
    top = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([f"## {title}", "", *top, *lines]) if lines else ""


def _pair_of(row: Row) -> tuple[int | str, ...]:
    """What two compared runs share; runs of other starting weights are not compared."""
    return row["pairs"], row["duplicates"], row["batch"], row["seed"], row.get("start", "")


def _mean(row: Row, part: str) -> float:
    return statistics.mean(row[part].values())


def _plain(row: Row) -> bool:
    """Whether a run from the usual starting weights has no remedy but the mask."""
    usual = row["rho"] == "auto" or not (row["warm"] or has_rho(row["method"]))
    remedy = row["apart"] or row.get("more") or row.get("weights", "start") != "start"
    return usual and row["lr"] == RATE and not remedy


def blend_table(rows: Sequence[Row]) -> str:
    """The mixes with the starting weights, as Markdown.

    Args:
        rows: one for each run, part and share of the tuned weights.
    """
    if not rows:
        return ""
    groups: dict[tuple[int, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["pairs"], row["method"], row["alpha"]].append(row)
    lines = ["", "## Mixes with the starting weights", ""]
    lines += ["| pairs | method | alpha | seeds | development | test | icons |", "| --- " * 7 + "|"]
    for (pairs, method, alpha), members in sorted(groups.items()):
        parts = [
            [row["emoji"] for row in members if row["part"] == part]
            for part in ("development", "test")
        ]
        known = [row["icons"] for row in members if row["part"] == "development"]
        spreads = " | ".join(map(_spread, [*parts, known]))
        lines.append(f"| {pairs} | {method} | {alpha:g} | {len(known)} | {spreads} |")
    return "\n".join(lines)


def _table(title: str, rows: Iterable[Row], keys: Sequence[str], part: str) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key, "") for key in keys)].append(row)
    if not groups:
        return ""
    splits = list(next(iter(groups.values()))[0][part])
    head = [*keys, "seeds", *(split.replace("_", " ") for split in splits), "icons", "temperature"]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for key, members in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        cells = [
            *map(_word, key),
            str(len(members)),
            *(_spread([row[part][split] for row in members]) for split in splits),
            _spread([statistics.mean(row["known"].values()) for row in members]),
            f"{statistics.mean(row['temperature'] for row in members):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "-"


def _spread(fractions: Sequence[float]) -> str:
    """Mean in percent, and half of the range over seeds."""
    percent = [100 * fraction for fraction in fractions]
    half = (max(percent) - min(percent)) / 2
    return f"{statistics.mean(percent):.1f}" + (f" ± {half:.1f}" if len(percent) > 1 else "")
