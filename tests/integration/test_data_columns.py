"""Training on a table with all its columns: exact resume, and errors before work is lost."""

import json
import shutil

import pytest
from PIL import Image

from neuclip.cli.app import main
from neuclip.run_folder import read_records

from .conftest import SMALLEST
from .test_resume import assert_same_checkpoint


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Forty pairs: three samples share each image, every fifth lacks its long caption."""
    folder = tmp_path_factory.mktemp("columns")
    lines = []
    for number in range(40):
        color = (number // 3 * 12, 255 - number // 3 * 12, 99)
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        row = {
            "image": f"{number}.png",
            "long": f"a plain picture of colour {number}" if number % 5 else None,
            "short": [f"colour {number}", f"hue {number}"],
            "not": [f"colour {number + 1}", f"no colour {number}"],
            "weight": 0.5 + number % 2,
            "kind": number // 6,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "t.jsonl").write_text("".join(lines))
    return folder / "t.jsonl"


def command(table, name, *more):
    return [
        "train", "--train-data", str(table), "--caption-keys", "long=3,short=1", "--label-key",
        "kind", "--model", SMALLEST, "--batch-size", "4", "--epochs", "1", "--warmup", "1",
        "--workers", "0", "--device", "cpu", "--logs", str(table.parent / "logs"), "--name", name,
        *more,
    ]  # fmt: skip


ALL = (
    "--hard-negative-key", "not", "--pair-weight-key", "weight", "--false-negatives", "mask",
    "--no-duplicates", "--save-every-steps", "2", "--keep-step-checkpoints", "9",
    "--log-every-n-steps", "1",
)  # fmt: skip


def test_a_run_with_all_columns_resumes_exactly(table):
    logs = table.parent / "logs"
    assert main(command(table, "whole", *ALL)) == 0
    whole, cut = logs / "whole", logs / "cut"
    assert len(read_records(whole / "metrics.jsonl")) == 10
    shutil.copytree(whole, cut)
    for checkpoint in (cut / "checkpoints").glob("*.pt"):
        if checkpoint.name != "iter_2.pt":
            checkpoint.unlink()
    assert main(command(table, "cut", *ALL, "--resume", "latest")) == 0
    assert_same_checkpoint(whole / "checkpoints/epoch_1.pt", cut / "checkpoints/epoch_1.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-duplicates", "--batch-size", "9"], "a batch of 9 pairs needs as many"),
        ([], "--label-key kind has no effect: add --false-negatives mask or --no-duplicates"),
        (["--pair-weight-key", "long", "--no-duplicates"], "'long' is 'a plain picture of colour"),
    ],
)
def test_mistakes_end_before_the_first_step(table, capsys, flags, message):
    assert main(command(table, "wrong", *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_labels_that_are_all_equal_are_refused(table, capsys, tmp_path):
    rows = [json.loads(line) | {"kind": "x"} for line in table.read_text().splitlines()]
    for row in rows:
        row["image"] = str(table.parent / row["image"])
    same = tmp_path / "t.jsonl"
    same.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(same, "equal", "--false-negatives", "mask")) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "40 samples tried all have the label 'x'" in printed
    assert "leave --label-key out" in printed
