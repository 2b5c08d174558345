"""Rewrites rows of format 1 in the names of format 2.

    python -m studies.default.migrate studies/default/results/*.json*

Until 2026-11-28 one method named `neuclip` was both the published network of trained prototypes and
the pool of the newest embeddings. The pool is now `neuclip_pool`, and `neuclip` is the published
method with the paper's defaults. This script renames methods, settings, labels and cells, and
changes no measured number. A row keeps the text it replaces under `was`; `restored` gives the old
row back.

- Settings whose defaults changed are written out, so that a row still resolves to what was trained.
- The variants of `ideas.py` are methods of their own instead of a field `idea`.
- The catalogue no longer has a pool with *trained* prototypes. Its rows are marked `history`.
- `code` stays: the digest of the code that computed the row, by the rule of that day.
- In the probe's results, the command and the settings of the run are renamed.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LABELS = {"neuclip": "neuclip_pool", "neuclip-paper": "neuclip"}
IDEAS = {
    "": "neuclip_pool",
    "own-excluded": "neuclip_pool",  # the product's since 2026-11-27
    "whole-gradient": "pool_whole_gradient",
    "anchor-gamma": "pool_anchor_gamma",
    "age-weights": "pool_age_weights",
    "fresh-gradient": "pool_own_counted",
    "fresh-gradient-rho5": "pool_own_counted",
}
"""Method of a row with a pool, by its field `idea`."""
NEWEST_ONLY = {"own-excluded", "fresh-gradient", "fresh-gradient-rho5"}
"""Ideas that took the gradient from the newest 32 batches before there was a setting for it."""
FRESH_BATCHES = 32

RENAMED = {"num_prototypes": "pool_size", "gradient_prototypes": "gradient_size"}
NETWORK_ONLY = ("refresh", "restart_steps", "prototype_lr", "prototype_optimizer", "log_weights")
"""Settings of format 1 that a pool does not have."""
FORMER_DEFAULTS = {
    "num_prototypes": None, "inner_steps": 0, "restart_steps": 500, "refresh": "fifo",
    "gradient": "full", "gamma": 0.4, "rho": 6.5, "epsilon": 1e-14, "temperature_gradient": "exact",
}  # fmt: skip
DEFAULTS = {
    "num_prototypes": 4096, "inner_steps": 10, "restart_steps": 500, "refresh": "restart",
    "gradient": "detached", "gamma": None, "rho": 11.0, "epsilon": 1e-6,
    "temperature_gradient": "fastclip",
}  # fmt: skip
"""Of `neuclip` in format 1 and in format 2, where they differ or could be left out."""

HISTORY = "the catalogue has no pool with trained prototypes since 2026-11-28"


def migrated(row: Mapping[str, Any]) -> Row:
    """A row in format 2; rows of format 2 are returned as they are."""
    if row["format"] != 1:
        return dict(row)
    new: Row = {**row, "format": 2, "label": LABELS.get(row["label"], row["label"])}
    new["cell"] = _cell(new)
    new["method"] = method(row["method"], str(row.get("idea", "")), row["batch"])
    new.pop("idea", None)
    if new["method"]["name"] == "neuclip_pool_trained":
        new["history"] = HISTORY
    changed = {key: row[key] for key in row if new.get(key) != row[key] and key != "format"}
    return {**new, "was": changed} if changed else new


def restored(row: Mapping[str, Any]) -> Row:
    """The row of format 1 that a row was made from."""
    kept = {key: value for key, value in row.items() if key not in {"was", "history"}}
    return {**kept, **row.get("was", {}), "format": 1}


def _cell(row: Mapping[str, Any]) -> str:
    parts = (row["stage"], row["label"], row["note"], f"b{row['batch']}", f"n{row['samples']}")
    return "_".join(part for part in (*parts, f"s{row['seed']}") if part)


def method(settings: Mapping[str, Any], idea: str, batch: int) -> Row:
    """The settings of a method in the names of format 2.

    Args:
        settings: of format 1, its name among them.
        idea: the row's.
        batch: pairs in a batch, on which the default of `gradient_size` depends.
    """
    if settings["name"] != "neuclip":
        return dict(settings)
    if _setting(settings, "refresh") == "fifo":
        return _pool(settings, idea, batch)
    return _network(settings)


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    return settings.get(key, FORMER_DEFAULTS[key])


def _network(settings: Mapping[str, Any]) -> Row:
    """Settings of the published method, those at their default left out."""
    explicit = {key: _setting(settings, key) for key in DEFAULTS}
    kept = {key: value for key, value in explicit.items() if value != DEFAULTS[key]}
    others = {key: value for key, value in settings.items() if key not in DEFAULTS}
    return {**others, **kept}


def _pool(settings: Mapping[str, Any], idea: str, batch: int) -> Row:
    new = {RENAMED.get(key, key): value for key, value in settings.items()}
    if _setting(settings, "inner_steps") > 0:
        return {**new, "name": "neuclip_pool_trained"}
    new = {key: value for key, value in new.items() if key not in {*NETWORK_ONLY, "inner_steps"}}
    if new.get("gradient") == "full":
        del new["gradient"]
    newest = FRESH_BATCHES * batch
    if new["pool_size"] > newest and new.get("gradient_size") is None:
        new["gradient_size"] = newest if idea in NEWEST_ONLY else new["pool_size"]
    return {**new, "name": IDEAS[idea]}


def migrate_file(path: Path) -> None:
    """Rewrites a file of rows, or a file of the probe's results."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [migrated(json.loads(line)) for line in text.splitlines()]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(migrated_probe(json.loads(text)), indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def migrated_probe(result: Mapping[str, Any]) -> Row:
    """Results of the probe with the command and the settings of today."""
    if "was" in result:
        return dict(result)
    script = ("benchmarks/normalizer_probe.py", "studies/quality/probe.py")
    run = {**result["run"], "method": method(result["run"]["method"], "", 64)}
    was = {"command": result["command"], "run": result["run"]}
    return {**result, "command": result["command"].replace(*script), "run": run, "was": was}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        migrate_file(Path(name))
