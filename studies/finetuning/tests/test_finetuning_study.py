"""The study of fine-tuning: its plan, its pairs and its tables."""

import csv
import io
import json
import tarfile
from dataclasses import asdict, replace
from itertools import islice, product

import pytest
from studies.finetuning import finetune, measure
from studies.finetuning.cells import EPOCHS, LION, RATE, Cell, is_blended, plan, stages
from studies.finetuning.finetune import mixes, read_rows
from studies.finetuning.measure import accuracies, train_flags
from studies.finetuning.pairs import write_pairs
from studies.finetuning.splits import KNOWN, SPLITS
from studies.finetuning.tables import blend_table, tables

from neuclip.cli.terminal import print_mixes
from neuclip.cli.train import parse_train
from neuclip.errors import UserError
from neuclip.evaluation.blend_choice import Mix


def test_equal_runs_occur_once_and_every_stage_is_there():
    cells = list(plan())
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.name for cell in cells} == {cell.name for cell in stages()}
    assert all(cell.pairs in EPOCHS for cell in cells)


def test_mixed_are_the_usual_runs_of_two_methods_at_half_shared_captions():
    mixed = [cell for cell in plan() if is_blended(cell)]
    assert sorted((cell.pairs, cell.method, cell.seed) for cell in mixed) == sorted(
        product((2_500, 10_000), ("neuclip_pool", "openclip"), (0, 1, 2))
    )
    assert all((cell.duplicates, cell.lr, cell.weights) == (50, RATE, "start") for cell in mixed)
    assert not any(cell.mask or cell.apart or cell.more for cell in mixed)
    assert all(cell.rho == ("auto" if cell.method == "neuclip_pool" else "") for cell in mixed)


def test_the_name_tells_every_setting():
    cell = Cell("rate", "openclip")
    others = {
        "method": "siglip", "pairs": 1_000, "duplicates": 0, "batch": 16, "lr": 2e-3,
        "rho": "auto", "warm": 1, "mask": True, "apart": True, "seed": 1,
        "more": "--glofnd-alpha 0.01", "weights": "sharp",
    }  # fmt: skip
    names = {replace(cell, **{key: value}).name for key, value in others.items()}
    assert len(names | {cell.name}) == len(others) + 1
    assert replace(cell, stage="batch").name == cell.name


def row(cell: Cell, development: float, test: float = 0.5) -> dict:
    return {
        "cell": cell.name,
        **asdict(cell),
        "development": {"unseen_vendor": development},
        "test": {"unseen_vendor": test},
        "known": {"unseen_style_development": 0.25},
        "temperature": 0.02,
    }


def test_choices_show_development_and_the_last_table_shows_test():
    base = Cell("remedies", "openclip", 2_500, lr=RATE)
    cells = [base, replace(base, seed=1), replace(base, mask=True)]
    figures = zip(cells, (0.1, 0.2, 0.3), (0.6, 0.6, 0.7), strict=True)
    said = tables({cell.name: row(cell, *figure) for cell, *figure in figures})
    remedies, last = said.split("\n\n## Test splits")
    assert "| openclip | - | no | no | 0 | - | 2 | 15.0 ± 5.0 | 25.0 ± 0.0 | 0.0200 |" in remedies
    assert "| openclip | - | yes | no | 0 | - | 1 | 30.0 | 25.0 | 0.0200 |" in remedies
    assert "60.0" not in remedies
    assert "| 2500 | 50 | openclip | no | 2 | 60.0 ± 0.0 | 25.0 ± 0.0 | 0.0200 |" in last


def test_rows_and_accuracies_are_read(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == {}
    path.write_text('{"cell": "a", "x": 1}\n\n{"cell": "b"}\n')
    assert read_rows(path)["a"]["x"] == 1
    records = [
        {"kind": "step", "loss": 1.0},
        {"kind": "eval", "split": "s", "metrics": {"acc1": 0.1}},
        {"kind": "eval", "split": "s", "metrics": {"acc1": 0.2}},
    ]
    assert accuracies(records) == {"s": 0.2}


def test_mixes_are_read_as_they_are_printed(capsys):
    given = [Mix(0.0, 0.25, 0.5), Mix(0.25, 0.1234, 0.4), Mix(1.0, 0.375, 0.4)]
    print_mixes(given, given[1])
    printed = capsys.readouterr().out
    found = [
        {"alpha": 0.0, "emoji": 0.25, "icons": 0.5},
        {"alpha": 0.25, "emoji": 0.1234, "icons": 0.4},
        {"alpha": 1.0, "emoji": 0.375, "icons": 0.4},
    ]
    assert mixes(printed) == [pytest.approx(row) for row in found]
    assert blend_table([]) == ""
    rows = [
        {"pairs": 2500, "method": "openclip", "part": p, **mix}
        for mix in found
        for p in ("development", "test")
    ]
    assert "| 2500 | openclip | 0.25 | 1 | 12.3 | 12.3 | 40.0 |" in blend_table(rows)


@pytest.mark.parametrize(("duplicates", "shared"), [(0, 0), (50, 4), (90, 7)])
def test_a_share_of_the_captions_is_the_bare_name(tmp_path, duplicates, shared):
    shard(tmp_path / "emoji" / "train" / "00000.tar", concepts=5)
    table = write_pairs(tmp_path / "emoji", tmp_path, Cell("rate", "openclip", 8, duplicates))
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert sum(", flat emoji by" not in row["title"] for row in rows) == shared
    assert write_pairs(tmp_path / "emoji", tmp_path, Cell("rate", "siglip", 8, duplicates)) == table


def shard(path, concepts: int) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in range(2 * concepts):
            record = {"concept": f"thing {number // 2}", "style": "flat", "set": f"set{number % 2}"}
            contents = {"png": b"picture", "json": json.dumps(record).encode()}
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_differences_are_of_equal_pairs_duplicates_and_seeds():
    base = Cell("methods", "openclip", 1_000, 90, lr=RATE)
    pool = replace(base, method="neuclip_pool", rho="auto", warm=32)
    figures = [
        (base, 0.1), (replace(base, seed=1), 0.2), (replace(base, seed=2), 0.9),
        (pool, 0.2), (replace(pool, seed=1), 0.4), (replace(pool, mask=True), 0.5),
    ]  # fmt: skip
    said = tables({cell.name: row(cell, *figure) for cell, *figure in figures})
    infonce, mask = said.split("## Less openclip")[1].split("## Mask less")
    # Student's t with one degree of freedom: 15 +- 12.706 * 7.071 / sqrt(2).
    assert "| neuclip_pool | 1,000 | 32 | 2 | +15.0 ± 63.5 | +0.0 ± 0.0 | +0.0 ± 0.0 |" in infonce
    assert "| neuclip_pool | all | all | 2 | +15.0 ± 63.5 | +0.0 ± 0.0 | +0.0 ± 0.0 |" in infonce
    assert "| neuclip_pool | 1,000 | 90 | 1 | +30.0 | +0.0 | +0.0 |" in mask


def test_runs_of_other_batches_or_starting_weights_are_not_compared():
    base = Cell("batch", "openclip", 1_000, batch=16, lr=RATE)
    pool = replace(base, method="neuclip_pool", rho="auto", warm=32)
    rows = [row(base, 0.1), row(pool, 0.2), row(replace(pool, batch=64), 0.3)]
    said = tables({each["cell"]: each for each in rows})
    infonce = said.split("## Less openclip")[1]
    assert "| neuclip_pool | 1,000 | 16 | 1 | +10.0 | +0.0 | +0.0 |" in infonce
    assert "| 64 |" not in infonce
    assert "| neuclip_pool | all | all | 1 | +10.0 |" in infonce
    backwards = infonce.split("## Less neuclip_pool")[1]
    assert "| openclip | 1,000 | 16 | 1 | -10.0 | +0.0 | +0.0 |" in backwards
    rows[1]["start"] = "other weights"
    assert "## Less openclip" not in tables({each["cell"]: each for each in rows})


def test_lion_is_compared_with_adamw_at_its_own_rate():
    adamw = Cell("optimiser", "openclip", 10_000, lr=RATE)
    lion = replace(adamw, lr=2e-4, more=LION[2e-4])
    said = tables({cell.name: row(cell, value) for cell, value in ((adamw, 0.1), (lion, 0.3))})
    assert (
        "| openclip | 10,000 | 0.0002 | 1 | +20.0 | +0.0 | +0.0 |" in said.split("## Lion less")[1]
    )
    choices = said.split("## Optimiser")[1]
    assert "| openclip | 0.001 | - | 1 | 10.0 | 25.0 | 0.0200 |" in choices
    assert "| openclip | 0.0002 | --opt lion --wd 0.5 | 1 | 30.0 | 25.0 | 0.0200 |" in choices


TOLD = {
    "pairs": "pairs.csv", "emoji": "emoji", "icons": "icons", "weights": "start", "start": "abc",
}  # fmt: skip


def test_the_flags_of_a_cell_are_those_of_the_program():
    cell = Cell("remedies", "neuclip_pool", 1_000, lr=RATE, rho="auto", warm=32, mask=True, seed=2)
    config = parse_train(train_flags(cell, {**TOLD, "runs": "runs"})).config
    assert (config.name, config.output.logs, config.seed) == (cell.name, "runs", 2)
    assert (config.method.rho, config.optim.warm_start_steps) == ("auto", 32)
    assert (config.data.false_negatives, config.data.no_duplicates) == ("mask", False)
    assert config.optim.epochs == config.evaluation.val_frequency == EPOCHS[1_000]
    splits = config.evaluation.val_data.split("::")
    assert splits[:2] == ["emoji/unseen_vendor_development", "emoji/unseen_emoji_development"]
    assert splits[-1] == "icons/unseen_style_development"
    more = replace(cell, apart=True, more="--opt lion --wd 0.5")
    config = parse_train(train_flags(more, {**TOLD, "runs": "runs"})).config
    assert (config.optim.opt, config.optim.wd, config.data.no_duplicates) == ("lion", 0.5, True)


def test_a_row_has_the_last_accuracies_and_a_failed_run_has_none(tmp_path, monkeypatch):
    cell = Cell("rate", "openclip", 1_000)
    told = {**TOLD, "runs": str(tmp_path), "cell": asdict(cell)}
    splits = [f"{split}_{part}" for split in SPLITS for part in ("development", "test")]

    def train_run(config, run):
        run.mkdir()
        records = []
        for step, value in enumerate((0.1, 0.2)):
            records.append({"kind": "step", "step": step, "temperature": 0.07 - value / 10})
            records += [
                {"kind": "eval", "step": step, "split": split, "metrics": {"acc1": value}}
                for split in (*splits, KNOWN)
            ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))

    monkeypatch.setattr(measure, "train_run", train_run)
    row = measure.tune_cell(told, tmp_path)
    assert row["development"] == row["test"] == dict.fromkeys(SPLITS, 0.2)
    assert (row["temperature"], row["start"]) == (pytest.approx(0.05), "abc")
    assert {"seconds", "cpu_seconds"} <= row.keys()
    monkeypatch.setattr(measure, "train_run", lambda config, run: "the loss is not finite")
    with pytest.raises(UserError, match="not finite"):
        measure.tune_cell(told, tmp_path)


def test_the_runner_tells_a_cell_its_pairs_and_its_weights(tmp_path, monkeypatch):
    digests = []
    monkeypatch.setattr(finetune, "start_digest", lambda run: digests.append(run) or run.name)
    monkeypatch.setattr(finetune, "write_pairs", lambda emoji, folder, cell: folder / "pairs.csv")
    folders = ["--icons", "i", "--emoji", "e", "--out", str(tmp_path)]
    runner = finetune.runner(finetune.arguments(["run", *folders]))
    sharp = [runner.study.facts(replace(cell, weights="sharp")) for cell in islice(plan(), 2)]
    assert [told["start"] for told in sharp] == ["sharp", "sharp"]
    assert digests == [tmp_path / "sharp"]
    assert sharp[0]["pairs"] == str(tmp_path / "pairs" / "pairs.csv")
    assert runner.study.plan({}) == list(plan())


def test_rows_without_a_digest_are_reported_and_not_continued(tmp_path):
    old = {"cell": "a", "seconds": 1}
    (tmp_path / "finetuning.jsonl").write_text(json.dumps(old) + "\n")
    assert read_rows(tmp_path / "finetuning.jsonl") == {"a": old}
    folders = ["--icons", "i", "--emoji", "e", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="which kept no digest; choose another --out"):
        finetune.runner(finetune.arguments(["run", *folders])).results.read()
