"""The commands, as a user types them."""

import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml

import neuclip
from neuclip.catalogue.registry import METHODS
from neuclip.cli.app import COMMANDS, GROUPS, main
from neuclip.cli.demo import Demo, fresh_name, train_flags
from neuclip.cli.train import parse_train
from neuclip.config.resolve import derived
from neuclip.data.demo.build import tiny_demo

TORCH_FREE = """
import sys
from neuclip.cli.app import main
lines = [
    ["--version"], ["--help"], ["train", "--help"], ["methods"], ["methods", "neuclip"],
    ["train", "--dry-run", "--npn"], ["train", "--lr", "-1"], ["train", "--bogus"], ["eval"],
    ["demo", "--help"], ["nonsense"], ["help", "train"], ["data"],
]
for line in lines:
    try:
        main(line)
    except SystemExit:
        pass
heavy = {"torch", "open_clip", "matplotlib", "PIL", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def run(*argv: str) -> int:
    """The exit code, whoever gives it."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def test_help_errors_and_dry_run_load_no_torch():
    done = subprocess.run([sys.executable, "-c", TORCH_FREE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["neuclip.training.main", "neuclip"])
def test_modules_open_the_same_door(module, capsys):
    words = ["--method", "openclip", "--lr", "1e-3", "--dry-run"]
    before = [] if module.endswith("main") else ["train"]
    done = subprocess.run(
        [sys.executable, "-m", module, *before, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert run("train", *words) == 0
    assert capsys.readouterr().out == done.stdout
    assert done.stderr == ""


def test_dry_run_prints_the_configuration_and_nothing_else(capsys):
    assert run("train", "--dry-run", "--npn", "--local-loss") == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["method"]["name"] == "neuclip"
    step, gamma, tree = out.split("\n", 2)
    assert step == "# pairs per step: 64 = 64 x 1 process"
    assert gamma.startswith("# gamma: 1 in the first epoch, then along half a cosine to 0.3368")
    assert tree == derived(parse_train(["--npn"]).config).to_yaml()
    assert [line.split(":")[0] for line in err.splitlines()] == ["neuclip"] * 2


@pytest.mark.parametrize("line", ["--help", "-h", "help"])
def test_overview_lists_the_commands(line, capsys):
    assert run(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: neuclip COMMAND")
    assert all(f"  {name}  " in out for name in COMMANDS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands(group, capsys):
    for line in ([group, "--help"], ["help", group]):
        assert run(*line) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: neuclip {group} COMMAND")
        shown = [name for name in COMMANDS if f"  {name}  " in out]
        assert shown == [name for name in COMMANDS if name.startswith(f"{group} ")]


@pytest.mark.parametrize("line", ["", *GROUPS])
def test_a_line_without_a_command_is_an_error_that_lists_them(line, capsys):
    assert run(*line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"usage: neuclip {line}".rstrip() + " COMMAND")


def test_the_lists_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for line in ("help", "help data"):
        run(*line.split())
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run(*command.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: neuclip {command}" in out
    assert "default: None" not in out


@pytest.mark.parametrize("command", ["train", "data pack"])
def test_help_of_a_command(command, capsys):
    assert run("help", *command.split()) == 0
    assert f"usage: neuclip {command}" in capsys.readouterr().out


def test_an_unknown_flag_names_the_commands_help(capsys):
    assert run("eval", "--bogus") == 2
    assert "neuclip eval --help" in capsys.readouterr().err


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"neuclip {neuclip.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("help trian", "unknown command 'trian'; did you mean 'train'?"),
        ("dta", "unknown command 'dta'; did you mean 'data'?"),
        ("data dmo", "unknown command 'data dmo'; did you mean 'data demo'? known: data bench"),
        ("methods nueclip", "unknown method 'nueclip'; did you mean 'neuclip'?"),
        ("demo --method nueclip", "unknown method 'nueclip'; did you mean 'neuclip'?"),
        ("demo --epochs -1", "--epochs: -1 is out of range; it must be >= 0"),
        ("demo --epochs 0", "--epochs 0 leaves nothing to evaluate: give 1 or more"),
        ("train --lr -1", "--lr: -1 is out of range; it must be > 0"),
        ("report", "at least one run folder"),
        ("eval no-such-run --batch-size 0", "--batch-size: 0 is out of range; it must be >= 1"),
        ("eval no-such-run --workers -1", "--workers: -1 is out of range; it must be >= 0"),
        ("eval no-such-run", "no-such-run"),
        ("data demo --out somewhere --size 3", "at least 16 pixels"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("neuclip: ")
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuclip.cli.app.parse_train", interrupted)
    assert run("train") == 130
    assert capsys.readouterr().err == "neuclip: interrupted\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("neuclip.cli.app.parse_train", broken)
    with pytest.raises(ZeroDivisionError):
        run("train")


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from neuclip.cli.app import main; sys.exit(main(['train', '--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_methods_lists_each_with_its_paper(capsys):
    assert run("methods") == 0
    out = capsys.readouterr().out
    for info in METHODS.values():
        assert info.summary in out
        assert info.paper in out
    assert "\x1b" not in out


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_one_method_shows_formula_settings_and_paper(info, capsys):
    assert run("methods", info.name) == 0
    out = capsys.readouterr().out
    assert info.formula.rstrip() in out
    assert info.paper in out
    for key, field in info.settings.model_fields.items():
        assert key == "name" or (f"  {key} = " in out and str(field.description) in out)


def test_one_method_names_flags_units_and_ranges(capsys):
    run("methods", "neuclip")
    out = capsys.readouterr().out
    assert "restart_steps = 500 steps; >= 1" in out
    assert "--restart-steps, --npn-restart-iter" in out


DEVELOPMENT = ("unseen_face_development", "unseen_character_development")
TEST = ("unseen_face_test", "unseen_character_test")


def test_fresh_name(tmp_path):
    assert fresh_name(tmp_path, "demo") == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert fresh_name(tmp_path, "demo") == "demo-3"


def test_a_method_without_a_demo_recipe_uses_its_defaults(monkeypatch):
    monkeypatch.setattr("neuclip.cli.demo.recipe_names", lambda: ["demo"])
    config = parse_train(train_flags(Demo(method="openclip"), Path("data"), Path("runs"))).config
    assert (config.method.method, config.model.name) == ("openclip", "glyph-tiny")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder where `neuclip demo` was run on a handful of characters, and what it printed."""
    out = tmp_path_factory.mktemp("cli") / "demo"
    (out / "runs" / "demo-neuclip_pool").mkdir(parents=True)  # an older run: this one gets a number
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(
            "neuclip.data.demo.build.build_demo", lambda folder, progress=None: tiny_demo(folder)
        )
        assert run("demo", "--out", str(out), "--epochs", "1") == 0
    return out, printed.getvalue().splitlines()


@pytest.mark.slow
def test_demo_ends_with_the_verdict(demo):
    out, printed = demo
    lines = printed[-7:]
    assert lines[0].split() == ["split", "top-1", "chance"]
    assert [line.split()[0] for line in lines[1:5]] == [*DEVELOPMENT, *TEST]
    assert all(line.count("%") == 2 for line in lines[1:5])
    run_dir = out / "runs" / "demo-neuclip_pool-2"
    assert lines[5] == f"checkpoint  {run_dir / 'checkpoints' / 'epoch_1.pt'}"
    assert lines[6] == f"report      {run_dir / 'report.html'}"
    assert all(Path(line.split()[1]).is_file() for line in lines[5:])


@pytest.mark.slow
def test_eval_writes_what_it_prints(demo, capsys):
    run_dir = demo[0] / "runs" / "demo-neuclip_pool-2"
    results = run_dir / "eval_results" / "epoch_1_eval_results.jsonl"
    results.unlink()
    assert run("eval", str(run_dir), "--workers", "0", "--device", "cpu") == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["key"] for record in records] == list(DEVELOPMENT)
    for record in records:
        assert f"{100 * record['metrics']['acc1']:.2f} %" in out
        assert f"{record['metrics']['normalizer_mse']:.3f}" in out
    assert str(results) in out


@pytest.mark.slow
def test_eval_of_one_split_and_report(demo, capsys, tmp_path):
    run_dir = demo[0] / "runs" / "demo-neuclip_pool-2"
    split = demo[0] / "data" / "unseen_character_test"
    line = ["eval", str(run_dir / "checkpoints" / "epoch_1.pt"), "--val-data", str(split)]
    assert run(*line, "--workers", "0") == 0
    assert "unseen_face_test" not in capsys.readouterr().out
    page = tmp_path / "r.html"
    assert run("report", str(run_dir), "--out", str(page)) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "line",
    [
        "eval {long}",
        "eval {file}/x",
        "eval {loop}",
        "report {long}",
        "export {long} --out x",
        "train --config {long}",
        "train --resume {long}/checkpoints/x.pt --name x --epochs 1 --train-data synthetic",
        "train --name {long} --train-data synthetic",
        "data inspect {long}",
    ],
)
def test_impossible_paths_are_one_line(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    places = {"long": "n" * 300, "file": tmp_path / "file", "loop": tmp_path / "loop"}
    assert main([word.format(**places) for word in line.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(("neuclip: ", "  ")) and not any("Traceback" in s for s in said)


def test_an_error_of_this_package_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise OSError("not of a path")

    monkeypatch.setattr("neuclip.cli.app._dispatch", fail)
    with pytest.raises(OSError, match="not of a path"):
        main(["methods"])
