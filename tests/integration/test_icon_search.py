"""The example of icons: each command of its Makefile, on small packages."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from icon_packages import write_icon_packages
from neuclip.cli.app import main
from neuclip.run_folder import read_records
from neuclip.search.local_server import LocalServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "icon_search"
NEEDED = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def steps(*goals, out="out"):
    """The command lines that make would run for goals, in their order."""
    line = ["make", "-n", "--no-print-directory", "NEUCLIP=neuclip", f"OUT={out}", *goals]
    said = subprocess.run(line, cwd=EXAMPLE, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in said.replace("\\\n", " ").splitlines()]


def done(words, *more):
    """Runs a line of neuclip in this process."""
    assert words[0] == "neuclip"
    assert main([*words[1:], *more]) == 0, words


@NEEDED
def test_the_steps_of_the_example(tmp_path, monkeypatch, capsys):
    """From packages to a page, as its Makefile says; shorter, but with all flags of its lines."""
    lines = steps("test", "search")
    assert [" ".join(words[: 3 if words[1] == "data" else 2]) for words in lines] == [
        "mkdir -p", "npm pack", "touch out/packages/complete", "neuclip data icons",
        "neuclip train", "touch out/trained", "neuclip eval", "neuclip search",
    ]  # fmt: skip
    icons, train, test, search = (words for words in lines if words[0] == "neuclip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("neuclip.data.icons.icon_sets._LEAST_USES", 1)  # few sets, few words
    shutil.copy(EXAMPLE / "recipe.yaml", tmp_path)
    Path("out/packages").mkdir(parents=True)
    write_icon_packages(Path("out/packages"))
    done(icons, "--concepts", "1", "--processes", "1")
    on_cpu = ("--device", "cpu", "--workers", "0")
    done(train, *on_cpu, "--smoke")
    evaluated = [r["split"] for r in read_records(Path("out/logs/icons/metrics.jsonl"))
                 if r["kind"] == "eval"]  # fmt: skip
    assert set(evaluated) == {"unseen_style_development", "unseen_concept_development"}
    capsys.readouterr()
    done(test, *on_cpu)
    said = capsys.readouterr()
    assert "unseen_style_test" in said.out
    # The line evaluates as training did, and without its flags the command says what differs.
    assert "training evaluated with" not in said.err
    done(
        ["neuclip", "eval", "out/logs/icons", "--val-data", "out/icons/unseen_style_test"], *on_cpu
    )
    said = capsys.readouterr().err
    assert "training evaluated with --caption-key concept --val-templates '{c}', and" in said

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalServer, "serve_forever", interrupted)
    done(search, *on_cpu, "--port", "0")
    shown = capsys.readouterr().out
    assert "images; features in out/embeddings" in shown and "stopped" in shown
    # What is done is left out.
    for made in ("packages/complete", "trained"):
        Path("out", made).touch()
    left = steps("search", out=str(tmp_path / "out"))
    assert [words[:2] for words in left] == [["neuclip", "search"]]
