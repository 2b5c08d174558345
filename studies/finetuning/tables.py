"""Tables of the study of fine-tuning: choices by development splits, figures of test splits."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def tables(rows: Mapping[str, Row]) -> str:
    """All tables as Markdown.

    Args:
        rows: the rows of the study, by the name of their cell.
    """
    if not rows:
        return "no finished cells"
    chosen: tuple[tuple[str, Callable[[Row], bool], tuple[str, ...]], ...] = (
        ("Rates and temperature", _in("rate"), ("method", "lr", "rho")),
        ("Remedies", _in("remedies"), ("method", "mask", "apart", "warm")),
        ("Methods", _in("methods"), ("pairs", "duplicates", "method", "mask")),
        ("Batch", _in("batch"), ("batch", "method")),
    )
    found = [_table(title, filter(keep, rows.values()), keys) for title, keep, keys in chosen]
    return "\n\n".join(filter(None, found))


def _in(stage: str) -> Callable[[Row], bool]:
    return lambda row: row["stage"] == stage


def _table(title: str, rows: Iterable[Row], keys: Sequence[str]) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    if not groups:
        return ""
    head = [*keys, "seeds", "development", "test", "glyphs kept", "temperature"]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for key, members in groups.items():
        cells = [
            *map(_word, key),
            str(len(members)),
            *(_spread([_mean(row[part]) for row in members]) for part in ("development", "test")),
            _spread([_mean(row["glyphs"]) for row in members]),
            f"{statistics.mean(row['temperature'] for row in members):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _word(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value) or "default")  # type: ignore[call-overload]


def _mean(splits: Mapping[str, float]) -> float:
    return 100 * statistics.mean(splits.values())


def _spread(values: Sequence[float]) -> str:
    """Mean, and half of the range over seeds."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")
