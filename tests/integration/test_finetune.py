"""`neuclip finetune` from a csv: what it derives, what it prints, and what a run records."""

import csv
import random
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from neuclip.cli.app import main
from neuclip.config.recipes import read_yaml
from neuclip.run_folder import read_records

from .conftest import SMALLEST

GUIDE = Path(__file__).parents[2] / "docs" / "finetune.md"
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A csv with 60 pictures, and weights that a short run made."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title"])
        for number in range(60):
            fore, back = draw.sample(COLOURS, 2)
            image = Image.new("RGB", (40, 40), back)
            ImageDraw.Draw(image).ellipse((8, 8, 20 + number % 16, 30), fill=fore)
            image.save(folder / f"{number}.png")
            table.writerow([f"{number}.png", f"item {number}, {fore} on {back}"])
    common = ["--workers", "0", "--device", "cpu", "--logs", str(folder / "logs")]
    flags = ["--model", SMALLEST, "--method", "openclip", "--batch-size", "16", "--epochs", "1"]
    data = ["--train-data", str(folder / "pairs.csv")]
    assert main(["train", *data, *flags, *common, "--warmup", "1", "--name", "first"]) == 0
    return folder, [*data, "--pretrained", str(folder / "logs" / "first"), *common]


def test_a_dry_run_shows_each_setting_and_the_equal_line(shop, capsys):
    folder, flags = shop
    line = ["finetune", *flags, "--lr", "1e-4", "--name", "shown"]
    capsys.readouterr()
    assert main([*line, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for words in ("--batch-size", "the smallest useful batch", "--rho", "auto", "5 % of 40 steps"):
        assert words in shown
    assert "1e-05 at batch" not in shown  # --lr is given
    command = shlex.split(shown.partition("the same as")[2])
    assert command[:2] == ["neuclip", "train"]
    assert "--dry-run" not in command
    assert not (folder / "logs" / "shown").exists()
    assert main([*command[1:], "--dry-run"]) == 0
    assert "lr: 0.0001" in capsys.readouterr().out
    assert main(["train", "--recipe", "finetune", *line[1:], "--dry-run"]) == 0
    again = capsys.readouterr().out
    assert again == shown


def test_with_validation_data_the_metric_of_the_best_epoch_is_named(shop, capsys):
    folder, flags = shop
    line = ["finetune", *flags, "--val-data", str(folder / "pairs.csv"), "--name", "shown"]
    capsys.readouterr()
    assert main([*line, "--opt", "lion", "--early-stop", "2", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--best-metric auto the best epoch is kept" in shown
    assert "best epoch by pairs.csv/mean_recall@1" in shown
    assert "over 10 for Lion" in shown
    assert main([*line, "--opt", "sgd", "--dry-run"]) == 2
    assert "--opt sgd: give --lr and --wd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--val-data", "nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["--canary", "nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["--best-metric", "val/acc1"], "--best-metric val/acc1 is not a metric of this run"),
        (["--force-image-size", "30"], "the nearest sizes are"),
        (["--model", "glyph-tiny"], "does not fit glyph-tiny"),
        (["--batch-size", "64", "--val-split", "none"], "60 samples is less than one global batch"),
        (["--batch-size", "58"], "--val-split 0.333 leaves 40 samples to train on, less than a"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(shop, flags, words, capsys):
    _, given = shop
    capsys.readouterr()
    assert main(["finetune", *given, *flags, "--name", "refused", "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert words in " ".join(shown.err.split())
    assert "the same as" not in shown.out


def test_missing_images_beyond_the_limit_are_found_before_the_first_step(shop, capsys):
    folder, flags = shop
    table = folder / "holes.csv"
    rows = (folder / "pairs.csv").read_text().splitlines()
    table.write_text("\n".join([*rows[:41], *(f"gone-{row}" for row in rows[41:])]))
    line = ["finetune", *flags, "--train-data", str(table), "--epochs", "1", "--name", "holes"]
    capsys.readouterr()
    assert main(line) == 2
    words = "20 of 60 samples are corrupt: more than --max-bad-fraction 0.01 allows"
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (folder / "logs" / "holes").exists()
    capsys.readouterr()
    assert main([*line, "--val-split", "none", "--no-duplicates"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_run_records_what_it_derived_and_continues_without_its_starting_weights(shop, capsys):
    folder, flags = shop
    first = folder / "logs" / "first"
    flags = [*flags, "--epochs", "4", "--stop-epochs", "2", "--name", "kept"]
    flags += ["--temperature", "0.03"]
    assert main(["finetune", *flags]) == 0
    run = folder / "logs" / "kept"
    log = (run / "out.log").read_text()
    assert "derived (neuclip finetune --dry-run says why): " in log
    assert "warm start done: 10 batches of 16 pairs, towers unchanged; rho " in log
    said = "temperature starts at 0.03; that of the weights is 0.07"
    assert said in capsys.readouterr().err
    steps = [r["temperature"] for r in read_records(run / "metrics.jsonl") if "temperature" in r]
    assert steps[0] == pytest.approx(0.03, rel=1e-3)
    before = read_yaml(run / "config.yaml")
    assert before["derive"] is None
    assert before["optim"]["lr"] == 2.5e-6
    assert before["method"]["rho"] == "auto"
    capsys.readouterr()
    shown = [word if word != "2" else "4" for word in flags]
    first.rename(first.with_name("moved"))
    assert main(["finetune", *shown, "--distill-start", "1", "--resume", "auto"]) == 2
    assert "--distill-start reads its starting weights when it goes on" in capsys.readouterr().err
    assert main(["finetune", *shown, "--resume", "auto"]) == 0
    first.with_name("moved").rename(first)
    after = read_yaml(run / "config.yaml")
    assert after["optim"] == {**before["optim"], "stop_epochs": 4}
    assert after["method"] == before["method"]
    kinds = [r["kind"] for r in read_records(run / "metrics.jsonl")]
    assert "train" in kinds
    assert "warm start done" not in capsys.readouterr().err  # it is part of the first start


def test_a_falling_temperature_stops_at_its_bound_and_weights_below_are_refused(shop, capsys):
    folder, flags = shop
    line = ["train", *flags, "--model", SMALLEST, "--method", "openclip", "--batch-size", "16"]
    line += ["--epochs", "1", "--warmup", "1", "--name"]
    falling = ["--method", "rgcl_batch", "--rho", "6.5", "--lr-tau", "0.2"]
    falling += ["--lr-tau-scheduler", "const", "--temperature", "0.05", "--temperature-min", "0.04"]
    assert main([*line, "sharp", *falling, "--log-every-n-steps", "1"]) == 0
    records = read_records(folder / "logs" / "sharp" / "metrics.jsonl")
    assert [r["temperature"] for r in records if "temperature" in r][-1] == pytest.approx(0.04)
    line[line.index("--pretrained") + 1] = str(folder / "logs" / "sharp")
    line.append("low")
    assert main([*line, "--temperature", "0.05", "--temperature-min", "0.06"]) == 2
    words = "--temperature-min: must be at most the temperature at the start, 0.05 (got 0.06)"
    assert words in " ".join(capsys.readouterr().err.split())
    assert main([*line, "--temperature-min", "0.05"]) == 2
    words = "--temperature-min 0.05: the weights have the temperature 0.04. Leave the flag out"
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (folder / "logs" / "low" / "checkpoints").exists()


def test_a_line_without_weights_says_what_is_missing(shop, capsys):
    _, flags = shop
    at = flags.index("--pretrained")
    assert main(["finetune", *flags[:at], *flags[at + 2 :]]) == 2
    assert "--pretrained takes a run folder" in capsys.readouterr().err


def test_the_commands_of_the_guide_lead_from_a_table_to_an_export(shop, monkeypatch, capsys):
    """In their order; the search page, which would wait for a reader, is tested on its own."""
    folder, _ = shop
    monkeypatch.chdir(folder)
    section = GUIDE.read_text(encoding="utf-8").partition("## From a table")[2].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("neuclip ")]
    assert [line.split()[1] for line in lines] == [
        "data", "finetune", "finetune", "report", "search", "export",
    ]  # fmt: skip
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "search":
            continue
        more = ["--workers", "0", "--device", "cpu"] if words[0] == "finetune" else []
        assert main([*words, *more]) == 0, line
    log = (folder / "logs/tuned/out.log").read_text()
    shown = [line for line in section.splitlines() if line.startswith("warm start")]
    assert len(shown) == 2
    for line in shown:  # the words are those of the guide, the numbers are its own data's
        assert line.partition("  loss")[0].split(":")[0] in log
    assert "keeps the temperature" in log
    assert list((folder / "tuned-open_clip").iterdir())
    assert (folder / "report.html").is_file()
