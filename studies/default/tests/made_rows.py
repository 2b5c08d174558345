"""Rows of results as a study would have written them."""

from studies.default.plan import CONTENDERS, LEARNING_RATES, Cell, plan, tuning_cell


def row_of(cell: Cell, acc1: float = 0.5, **others) -> dict:
    where = {"samples_seen": 100, "epoch": 1.0}
    splits = ("unseen_face", "unseen_character")
    return {
        "cell": cell.name, "code": "c0de", "data": "da7a", "date": "2026-01-02", "machine": "CPU",
        "stage": cell.stage, "label": cell.label, "note": cell.note, "seed": cell.seed,
        "batch": cell.batch, "samples": cell.samples, "epochs": cell.epochs, "cpu_seconds": 36.0,
        "method": dict(cell.method),
        "evaluations": [
            {**where, "split": split, "acc1": acc1, "mean_recall@1": 0.25} for split in splits
        ],
        "training": [{"samples_seen": 100, "temperature": 0.04}],
        "errors": [{"mse": 1.5, "mae": 1.0, "bias": -0.5, "minibatch_mse": 9.0}],
        **others,
    }  # fmt: skip


def grids(labels=tuple(CONTENDERS), best="lr0.002-t1") -> dict[str, dict]:
    cells = [
        tuning_cell(label, *point)
        for label in labels
        for point in (
            *((number, LEARNING_RATES[0]) for number in range(len(CONTENDERS[label].temperatures))),
            (1, LEARNING_RATES[1]),
        )
    ]
    scores = {"lr0.001-t1": 0.5, best: 0.6}  # the better temperature's higher rate is tried
    return {cell.name: row_of(cell, scores.get(cell.note, 0.4)) for cell in cells}


def with_finals(rows: dict[str, dict]) -> dict[str, dict]:
    """The grids, and the long runs of seed 0 that decide between temperatures."""
    finals = [cell for cell in plan(rows) if cell.stage == "final" and cell.seed == 0]
    return rows | {cell.name: row_of(cell) for cell in finals}
