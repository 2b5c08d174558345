"""Tables of the study of fine-tuning: choices by development splits, then the test splits."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.finetuning.cells import RATE, has_rho, plan, stages
from studies.shared.compare import difference, in_points

Row = Mapping[str, Any]

CHOICES = (
    ("Rates and temperature", "rate", ("method", "lr", "rho")),
    ("Remedies", "remedies", ("method", "rho", "mask", "apart", "warm", "more")),
    ("Methods", "methods", ("pairs", "duplicates", "method", "mask")),
    ("Batch", "batch", ("batch", "method")),
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
    found.append(_table("Test splits", tested, ("pairs", "duplicates", "method", "mask"), "test"))
    found += [_against_infonce(tested), _masked(tested)]
    return "\n\n".join(filter(None, found))


def _against_infonce(rows: Sequence[Row]) -> str:
    """Each method without mask less `openclip`, at equal pairs, duplicates and seeds."""
    runs = _by_method([row for row in rows if not row["mask"]])
    others = {method: mine for method, mine in runs.items() if method != "openclip"}
    compared = {method: (mine, runs.get("openclip", [])) for method, mine in others.items()}
    return _differences("Less openclip, paired runs", compared)


def _masked(rows: Sequence[Row]) -> str:
    """Each method with the mask less the same without, at equal pairs, duplicates and seeds."""
    shared = [row for row in rows if row["duplicates"]]
    masked = _by_method([row for row in shared if row["mask"]])
    without = _by_method([row for row in shared if not row["mask"]])
    compared = {method: (mine, without.get(method, [])) for method, mine in masked.items()}
    return _differences("Mask less no mask, paired runs", compared)


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["method"]].append(row)
    return found


def _differences(title: str, compared: Mapping[str, tuple[list[Row], list[Row]]]) -> str:
    """Mean differences in points with 95 % intervals, of the mean over the emoji, and of icons."""
    lines = []
    for method, sides in sorted(compared.items()):
        found = [
            difference(*({_pair_of(row): _mean(row, part) for row in side} for side in sides))
            for part in ("development", "test", "known")
        ]
        if found[0] is not None:
            cells = [method, str(found[0].seeds), *(in_points(each) for each in found if each)]
            lines.append(f"| {' | '.join(cells)} |")
    head = ["| method | pairs of runs | development | test | icons |", "| --- " * 5 + "|"]
    return "\n".join([f"## {title}", "", *head, *lines]) if lines else ""


def _pair_of(row: Row) -> tuple[int, int, int]:
    """What two compared runs share."""
    return row["pairs"], row["duplicates"], row["seed"]


def _mean(row: Row, part: str) -> float:
    return statistics.mean(row[part].values())


def _plain(row: Row) -> bool:
    """Whether a run has no remedy but the mask, and the usual batch."""
    usual = row["rho"] == "auto" or not (row["warm"] or has_rho(row["method"]))
    remedy = row["apart"] or row.get("more")
    return usual and row["lr"] == RATE and row["batch"] == 32 and not remedy


def blend_table(rows: Sequence[Row]) -> str:
    """The mixes with the starting weights, as Markdown.

    Args:
        rows: one for each run, part and share of the tuned weights.
    """
    if not rows:
        return ""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["alpha"]].append(row)
    lines = ["", "## Mixes with the starting weights", ""]
    lines += ["| method | alpha | seeds | development | test | icons |", "| --- " * 6 + "|"]
    for (method, alpha), members in sorted(groups.items()):
        parts = [
            [row["emoji"] for row in members if row["part"] == part]
            for part in ("development", "test")
        ]
        known = [row["icons"] for row in members if row["part"] == "development"]
        spreads = " | ".join(map(_spread, [*parts, known]))
        lines.append(f"| {method} | {alpha:g} | {len(known)} | {spreads} |")
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
