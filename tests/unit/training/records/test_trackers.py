"""TensorBoard and W&B, with modules that stand in for both packages."""

import importlib.util
import logging
import sys

import pytest
import torch

from neuclip.cli.app import main
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import OutputConfig
from neuclip.errors import Preempted, UserError
from neuclip.run_folder import RunFolder, read_records
from neuclip.training.records import trackers as module
from neuclip.training.records.recorder import Recorder
from neuclip.training.records.trackers import check_packages, trackers

TRAIN = {
    "kind": "train", "step": 3, "epoch": 0.5, "loss": 0.5, "lr": 1e-3, "logit_scale": 20.0,
    "samples_per_second": 640.0, "share_data": 0.25, "text": "no number",
}  # fmt: skip
IMAGENET = {
    "kind": "eval", "step": 3, "epoch": 1.0, "split": "imagenet-val",
    "metrics": {"acc1": 0.5, "acc5": 0.75, "mean_recall@1": 0.25},
}  # fmt: skip
BATCH = {"data": {"global_batch_size": 64}}


class CommError(Exception):
    __module__ = "wandb.errors"


class Wandb:
    """W&B: runs by id, which keep their steps; what is logged at an earlier step is dropped."""

    def __init__(self):
        self.runs, self.opened, self.error, self.command_line = {}, [], None, None

    def init(self, **given):
        if self.error is not None:
            raise self.error
        assert given["resume"] == "allow"
        self.command_line = sys.argv
        run = WandbRun(given, self.runs.setdefault(given["id"], {}))
        self.opened.append(run)
        return run


class WandbRun:
    def __init__(self, given, history):
        self.given, self.history, self.ended, self.error = given, history, [], None
        self.step = max(history, default=-1) + 1

    def log(self, values, step):
        if self.error is not None:
            raise self.error
        assert step >= self.step, "dropped"
        self.step = step
        self.history.setdefault(step, {}).update(values)

    def mark_preempting(self):
        self.ended.append("preempting")

    def finish(self, exit_code):
        self.ended.append(exit_code)


class TensorBoard:
    """TensorBoard's module: the scalars by name and step, of all writers."""

    def __init__(self):
        self.scalars, self.folder, self.open = {}, None, 0

    def SummaryWriter(self, folder):
        self.folder, self.open = folder, self.open + 1
        return self

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def flush(self):
        pass

    def close(self):
        self.open -= 1


@pytest.fixture
def packages(monkeypatch):
    """Both packages, and nothing of W&B in the environment."""
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    found = {"wandb": Wandb(), "torch.utils.tensorboard": TensorBoard()}
    monkeypatch.setattr(module.importlib, "import_module", found.__getitem__)
    return found


@pytest.fixture
def wandb(packages):
    return packages["wandb"]


def write(folder, *records, report_to="wandb", config=BATCH, **output):
    folder.mkdir(parents=True, exist_ok=True)
    with trackers(OutputConfig(report_to=report_to, **output), folder, config, 2) as sinks:
        for record in records:
            for sink in sinks:
                sink(record)


def test_names_of_open_clip_stand_beside_ours(packages, tmp_path):
    write(tmp_path / "run", TRAIN, IMAGENET, report_to="tensorboard,wandb")
    both = {
        "train/loss": 0.5, "train/lr": 1e-3, "train/logit_scale": 20.0, "train/scale": 20.0,
        "train/samples_per_second": 640.0, "train/samples_per_second_per_gpu": 320.0,
        "train/batch_time": 0.1, "train/data_time": 0.025, "epoch": 1.0,
        "eval/imagenet-val/acc1": 0.5, "val/imagenet-zeroshot-val-top1": 0.5,
        "val/imagenet-zeroshot-val-top5": 0.75, "eval/imagenet-val/mean_recall@1": 0.25,
    }  # fmt: skip
    (logged,) = packages["wandb"].runs.values()
    board = packages["torch.utils.tensorboard"]
    assert logged[3].items() >= {**both, "step": 3}.items()
    assert {(name, 3): value for name, value in both.items()}.items() <= board.scalars.items()
    assert "train/text" not in logged[3]
    assert board.folder == tmp_path / "run" / "tensorboard" and board.open == 0


def test_warnings_are_not_numbers_and_warm_starts_count_their_batches(packages, tmp_path):
    warm = {"kind": "warm_start", "warm_step": 7, "step": 0, "epoch": 0.0, "loss": 0.5}
    warning = {"kind": "warning", "step": 3, "epoch": 0.5, "text": "collapsed"}
    write(tmp_path / "run", warm, warning, report_to="all", config={})
    assert packages["torch.utils.tensorboard"].scalars["warm_start/loss", 7] == 0.5
    (logged,) = packages["wandb"].runs.values()
    assert list(logged) == [0]


def test_what_wandb_is_told(wandb, tmp_path, monkeypatch):
    write(tmp_path / "a" / "run", wandb_project_name="clips", wandb_notes="the first")
    monkeypatch.setenv("WANDB_PROJECT", "from-the-shell")
    write(tmp_path / "b" / "run")
    first, second = (run.given for run in wandb.opened)
    assert (first["project"], first["notes"], first["name"]) == ("clips", "the first", "run")
    assert (second["project"], second["notes"]) == ("from-the-shell", None)
    assert first["dir"] == str(tmp_path / "a" / "run") and first["config"] == BATCH
    assert "mode" not in first  # WANDB_MODE decides
    assert [run.ended for run in wandb.opened] == [[0], [0]]


def test_a_resumed_run_continues_its_own_curve(wandb, tmp_path):
    """The same id again, without what was logged before; another folder is another run."""
    for folder, steps in (("a", (1, 2, 3, 4)), ("a", (3, 4, 5)), ("b", (1,))):
        write(tmp_path / folder / "run", *({**TRAIN, "step": step} for step in steps))
    first, second = wandb.runs.values()
    assert list(first) == [1, 2, 3, 4, 5] and list(second) == [1]
    assert wandb.opened[0].given["id"] == wandb.opened[1].given["id"]


def test_an_evaluation_of_an_older_checkpoint_is_not_lost(wandb, tmp_path):
    write(tmp_path / "run", {**TRAIN, "step": 9})
    write(tmp_path / "run", IMAGENET)
    (history,) = wandb.runs.values()
    assert history[10]["eval/imagenet-val/acc1"] == 0.5 and history[10]["step"] == 3


def test_the_id_of_a_sweep(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep7")
    write(tmp_path / "run")
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    write(tmp_path / "run")
    assert list(wandb.runs) == ["sweep7"]


@pytest.mark.parametrize(
    "words",
    [
        ["--train-data", "https://me:hunter2@host/b.tar?sign=hunter2", "--seed", "7"],
        ["--train-data", "pipe:curl -H 'Authorization: Bearer hunter2' u", "--seed", "7"],
        ["--token", "hunter2", "--seed", "7"],
    ],
)
def test_the_command_line_that_wandb_keeps_has_no_secrets(wandb, tmp_path, monkeypatch, words):
    given = ["neuclip", *words]
    monkeypatch.setattr(sys, "argv", given)
    write(tmp_path / "run")
    kept = " ".join(wandb.command_line)
    assert "hunter2" not in kept and kept.startswith("neuclip ") and "***" in kept
    assert sys.argv is given


def test_wandb_that_cannot_be_opened(wandb, tmp_path):
    wandb.error = CommError("No API key configured.\nUse `wandb login`; see https://x/?key=1")
    with pytest.raises(UserError, match=r"^--report-to wandb: No API key.*WANDB_MODE=offline") as e:
        write(tmp_path / "run")
    assert "\n" not in str(e.value) and "key=1" not in str(e.value)
    wandb.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "run")


def test_wandb_that_fails_later_does_not_end_the_run(wandb, tmp_path, caplog):
    with (
        caplog.at_level(logging.WARNING, "neuclip"),
        trackers(OutputConfig(report_to="wandb"), tmp_path, {}) as (sink,),
    ):
        wandb.opened[0].error = RuntimeError("the service is gone")
        sink(TRAIN)
        sink(TRAIN)
    (record,) = caplog.records
    assert (
        "W&B takes no more records (the service is gone); metrics.jsonl has all" in record.message
    )


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (None, [0]),
        (UserError("x"), [1]),
        (KeyboardInterrupt(), [1]),
        (Preempted("x", "run"), ["preempting", 1]),
    ],
)
def test_wandb_learns_how_a_run_ended(wandb, tmp_path, error, ended):
    settings = RunConfig.model_validate({"output": {"report_to": "wandb"}})
    recorder = Recorder(settings, RunFolder(tmp_path), torch.device("cpu"))
    try:
        with recorder.open(0, 10):
            recorder.training({**TRAIN, "samples_seen": 9, "temperature": 0.1}, 64)
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    (run,) = wandb.opened
    assert run.ended == ended
    assert run.history[3]["train/loss"] == read_records(tmp_path / "metrics.jsonl")[0]["loss"]


def hide(monkeypatch, package):
    """Installs both packages but this one, as far as the search for packages goes."""
    find = importlib.util.find_spec
    found = {"tensorboard": True, "wandb": True, package: None}
    monkeypatch.setattr(
        module.importlib.util, "find_spec",
        lambda name, *rest: found[name] if name in found else find(name, *rest),
    )  # fmt: skip


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'neuclip\[wandb\]'"):
        write(tmp_path / "run")
    write(tmp_path / "run", report_to="none")


@pytest.mark.parametrize(("given", "absent"), [("tensorboard", "tensorboard"), ("all", "wandb")])
def test_missing_packages_are_found_before_a_run_is_opened(monkeypatch, given, absent):
    hide(monkeypatch, absent)
    with pytest.raises(UserError, match=rf"needs the package {absent}: pip install"):
        check_packages(OutputConfig(report_to=given))
    check_packages(OutputConfig())


@pytest.mark.parametrize("line", ["--train-data gone", "--pretrained gone --val-data gone"])
def test_missing_packages_are_found_before_data_and_weights(monkeypatch, capsys, tmp_path, line):
    hide(monkeypatch, "wandb")
    flags = f"--report-to wandb --device cpu --logs-dir {tmp_path}/logs"
    assert main(["train", *line.split(), *flags.split()]) == 2
    assert "--report-to needs the package wandb" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("given", ["mlflow", "wandb,mlflow", "none,wandb"])
def test_unknown_trackers(capsys, given):
    assert main(["train", "--train-data", "x", "--report-to", given, "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "--report-to: must be tensorboard, wandb, both joined by ',', all, or none" in message
