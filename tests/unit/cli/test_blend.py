"""`neuclip blend` on tiny checkpoints."""

import open_clip
import pytest
import torch

from neuclip.cli.app import main
from neuclip.cli.blend import parse_alphas
from neuclip.errors import UserError
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from tiny_models import VIT, tiny


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,0.1,..,1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0,0.25,...,1", [0, 0.25, 0.5, 0.75, 1]),
        ("0, 0.05, .., 0.2, 0.5, 1", [0, 0.05, 0.1, 0.15, 0.2, 0.5, 1]),
        ("1,0.5,..,0", [0, 0.5, 1]),
        ("0.3", [0.3]),
        ("0,1,..,1", None),
        ("0,0.3,..,1", None),
        ("0,..,1", None),
        ("0,0.1,..", None),
        ("0,0,..,1", None),
        ("0,1e-9,..,1", None),
        ("0,0.5,0.50", None),
        ("0,1.5", None),
        ("-0.1,1", None),
        ("nan", None),
        ("0;1", None),
        ("", None),
    ],
)
def test_alphas(text, expected):
    if expected is None:
        with pytest.raises(UserError, match=r"--alphas .*examples: 0,0\.1,\.\.,1"):
            parse_alphas(text)
    else:
        assert parse_alphas(text) == expected


@pytest.fixture
def models(tmp_path):
    """Files of two tiny models."""
    for name, seed in (("old", 1), ("new", 2)):
        torch.save(tiny(seed=seed).towers.state_dict(), tmp_path / f"{name}.pt")
    return tmp_path


def flags(models, *more):
    return [
        "blend", str(models / "old.pt"), str(models / "new.pt"), "--arch", VIT, "--device", "cpu",
        "--workers", "0", "--figure", str(models / "blend.svg"), *more,
    ]  # fmt: skip


def test_mixes_are_evaluated_drawn_and_written(models, demo_dir, capsys):
    own = str(demo_dir / "unseen_character_development")
    canary = str(demo_dir / "unseen_face_development")
    out = models / "mixed"
    data = ["--val-data", own, "--canary", canary, "--alphas", "0,0.5,1"]
    assert main(flags(models, *data, "--max-canary-loss", "100", "--out", str(out))) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if " % " in line]
    assert [row[0] for row in rows] == ["0", "0.5", "1"]
    assert "own data: unseen_character_development (" in printed
    assert "canary: unseen_face_development (" in printed
    chosen = next(row for row in rows if row[-1] == "chosen")
    assert max(float(row[1]) for row in rows) == float(chosen[1])
    assert f"chosen: alpha {chosen[0]}, the best on own data" in printed
    assert "own data" in (models / "blend.svg").read_text()

    alpha = float(chosen[0])
    ends = [torch.load(models / f"{name}.pt") for name in ("old", "new")]
    expected = {k: torch.lerp(ends[0][k], ends[1][k], alpha) for k in ends[0]}
    loaded = load_pretrained(CheckpointChoice(out), "cpu").checkpoint.weights
    theirs = open_clip.create_model(f"local-dir:{out}").state_dict()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value) and torch.equal(theirs[name], value)
    assert "x old.pt + " in (out / "README.md").read_text()
    # An end has the numbers that `neuclip eval` gives for its file.
    end = str(models / "old.pt")
    assert main(["eval", end, "--arch", VIT, "--device", "cpu", "--workers", "0",
                 "--val-data", own]) == 0  # fmt: skip
    top = [line for line in capsys.readouterr().out.splitlines() if "Zero-shot top-1" in line]
    assert f"{rows[0][1]} %" in top[0]


def test_errors_before_any_evaluation(models, demo_dir, capsys):
    own = ["--val-data", str(demo_dir / "unseen_character_development")]
    canary = ["--canary", str(demo_dir / "unseen_face_development")]
    (models / "mine.png").write_text("mine")
    (models / "full").mkdir()
    (models / "full" / "mine").touch()
    cases = [
        ([], "records no evaluation splits: give your own data with --val-data"),
        (canary, "give your own data with --val-data"),
        ([*own, "--max-canary-loss", "1"], "--max-canary-loss needs a canary"),
        ([*own, "--max-canary-loss", "1", "--alphas", "0.5,1"], "add 0 to --alphas"),
        ([*own, "--max-canary-loss", "-1"], "--max-canary-loss"),
        ([*own, "--license", "mit"], "--license has no effect without --out"),
        ([*own, "--figure", str(models / "a.pdf")], "ends in .png or .svg"),
        ([*own, "--figure", str(models / "mine.png")], "was not written by `neuclip blend`"),
        ([*own, "--out", str(models / "full")], "is not empty"),
        (["--val-data", str(models / "nothing")], "nothing"),
    ]
    for more, message in cases:
        assert main(flags(models, *more)) == 2, more
        shown = capsys.readouterr()
        assert message in shown.err.replace("\n  ", " ")
        assert "mixing" not in shown.out


def test_without_a_canary_the_best_on_own_data_wins(models, demo_dir, capsys):
    own = ["--val-data", str(demo_dir / "unseen_character_development"), "--alphas", "0,1"]
    assert main(flags(models, *own)) == 0
    shown = capsys.readouterr()
    assert "forgetting is not seen" in shown.err
    assert "the best on own data" in shown.out and "mean" not in shown.out
