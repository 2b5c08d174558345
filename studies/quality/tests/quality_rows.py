"""Rows of development and test splits as the study would have written them."""

from collections.abc import Iterable
from dataclasses import asdict

from studies.quality.cell import Cell
from studies.quality.datasets import DATA_SETS


def row_of(cell: Cell, acc1: float = 0.5, **others) -> dict:
    where = {"samples_seen": 92_000, "epoch": float(cell.passes)}
    return {
        **asdict(cell), "cell": cell.name, "format": 3, "code": "c0de", "data": "da7a",
        "date": "2026-01-02", "machine": "CPU", "torch": "2", "weights": "5ha",
        "pairs": 11_545, "seconds": 900.0, "cpu_seconds": 720.0, "error_cpu_seconds": 36.0,
        "evaluations": [
            {**where, "split": split, "acc1": acc1}
            for split in DATA_SETS[cell.data_set].split_names("development")
        ],
        "training": [{"samples_seen": 64, "temperature": 0.04}],
        "errors": [
            {"mse": 1.5, "mae": 1.0, "bias": -0.5, "minibatch_mse": 9.0, "temperature": 0.03}
        ],
        **others,
    }  # fmt: skip


def rows_of(cells: Iterable[Cell], acc1: float = 0.5) -> dict[str, dict]:
    return {cell.name: row_of(cell, acc1) for cell in cells}


def row_on_test_of(cell: Cell, acc1: float) -> dict:
    """A test row: top-1 on the first split, and a tenth more on the second."""
    first, second = DATA_SETS[cell.data_set].split_names("test")
    return {
        **asdict(cell), "cell": cell.name, "format": 3, "code": "c0de", "data": "da7a",
        "date": "2026-01-02", "machine": "CPU", "torch": "2", "weights": "5ha",
        "evaluations": [
            {"split": first, "acc1": acc1, "floor_top1": 0.215},
            {"split": second, "acc1": acc1 + 0.1, "floor_top1": None},
        ],
    }  # fmt: skip
