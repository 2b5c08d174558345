"""Starting a run folder, and finding what to resume."""

import json

import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.parallel.folder_lock import FolderLock
from neuclip.run_folder import RunFolder
from neuclip.training import open_run
from neuclip.training.open_run import changed_settings, earlier_config


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("neuclip.parallel.folder_lock.GRACE", 0.1)


def open_run_folder(logs, name, resume):
    with FolderLock() as lock:
        return open_run.open_run_folder(str(logs), name, resume, lock)


def begin(path, what):
    """A run folder after a failure, or with work in it."""
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    folder.config.write_text("data: {batch_size: 4096}\n")
    folder.metrics.write_text("")
    folder.log.write_text("out of memory\n")
    if what == "a record":
        folder.metrics.write_text(json.dumps({"kind": "train", "step": 1}) + "\n")
    elif what == "a checkpoint":
        folder.step_checkpoint(1).write_bytes(b"x")
    elif what == "a result":
        folder.results(1).parent.mkdir()
        folder.results(1).write_text("{}")
    elif what == "half a checkpoint":
        (folder.checkpoints / ".iter_1.pt.0123.partial").write_bytes(b"x")
    elif what == "half a record":
        folder.metrics.write_text('{"kind": "tra')
    return folder


@pytest.mark.parametrize("what", ["nothing", "half a checkpoint", "half a record"])
def test_what_a_failure_before_the_first_step_leaves_is_no_run(tmp_path, what):
    """The corrected command runs, with or without --resume auto, and with other settings."""
    folder = begin(tmp_path / "run", what)
    assert earlier_config(str(tmp_path), "run", "auto") is None
    for resume in (None, "auto", "latest"):
        assert open_run_folder(tmp_path, "run", resume) == (folder, None)


@pytest.mark.parametrize("what", ["a record", "a checkpoint", "a result"])
def test_an_existing_run_needs_resume(tmp_path, what):
    begin(tmp_path / "run", what)
    for open_it in (open_run_folder, lambda logs, *rest: earlier_config(str(logs), *rest)):
        with pytest.raises(UserError, match="already holds a run; continue it with --resume auto"):
            open_it(tmp_path, "run", None)
    assert not (tmp_path / "run" / "run.lock").exists()


def test_latest_is_the_one_of_that_name(tmp_path):
    folder = begin(tmp_path / "run", "nothing")
    folder.latest.write_bytes(b"x")
    assert open_run_folder(tmp_path, "run", "latest")[1].path == folder.latest


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "run.lock").symlink_to(tmp_path / "file")
    for logs, name in ((tmp_path / "file", "run"), (tmp_path, "run"), (tmp_path, "link")):
        for resume in (None, "auto", "latest"):
            with pytest.raises(UserError, match="cannot write the run folder") as caught:
                open_run_folder(logs, name, resume)
            assert "\n" not in str(caught.value)
    for name in ("x" * 300, "a\0b", "\u00fc" * 150):
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            open_run_folder(tmp_path, name, "auto")
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            earlier_config(str(tmp_path), name, "auto")
    assert (tmp_path / "file").read_text() == ""


def test_the_settings_of_the_run_to_resume(tmp_path):
    folder = begin(tmp_path / "run", "nothing")
    folder.config.write_text(RunConfig(seed=7).to_yaml())
    assert earlier_config(str(tmp_path), "run", None) is None
    storage.save(folder.step_checkpoint(1), {"state_dict": {"a": torch.ones(1)}})
    for resume in ("auto", "latest", str(folder.checkpoints / "epoch_1.pt")):
        earlier = earlier_config(str(tmp_path), "run", resume)
        assert earlier is not None
        assert earlier.seed == 7
    folder.config.write_text("seed: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        earlier_config(str(tmp_path), "run", "auto")


def test_what_a_continued_run_does_otherwise_is_named():
    before = resolve(RunConfig(), 2)
    assert changed_settings(before, resolve(RunConfig(), 2)) == ""
    tree = {
        "method": {"name": "neuclip_pool", "gamma": 0.2, "gradient_size": 64},
        "optim": {"lr": 1e-3},
        "compute": {"fused_loss": "off"},
        "data": {"workers": 7, "global_batch_size": 256, "aug_cfg": {"gray_scale_prob": 0.2}},
        "seed": 3,
    }
    assert changed_settings(before, resolve(validate(tree, "here"), 2)) == (
        "gamma 0.4 -> 0.2, gradient_size 4096 -> 64, lr 0.0005 -> 0.001, "
        "fused_loss auto -> off, aug_cfg none -> (scale=[0.9, 1.0] gray_scale_prob=0.2), "
        "global_batch_size 128 -> 256, seed 0 -> 3"
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "change"),
    [
        ("evaluation", "best_metric", "val/acc1", "best_metric val/acc1 -> none"),
        ("evaluation", "early_stop", 3, "early_stop 3 -> none, best_metric val/acc1 -> none"),
        ("evaluation", "val_data", "a.csv", "val_data a.csv -> none"),
        ("evaluation", "val_frequency", 2, "val_frequency 2 -> 1"),
        ("supervision", "token_weight", 1.0, "token_weight 1 -> 0"),
        ("data", "caption_keys", "long,short", "caption_keys long,short -> none"),
        ("data", "no_duplicates", True, "no_duplicates True -> False"),
        ("output", "report_to", "wandb", "report_to wandb -> none"),
        ("output", "save_every_steps", 9, "save_every_steps 9 -> 0"),
        ("data", "workers", 0, ""),
        ("data", "train_data", "elsewhere", ""),
        ("evaluation", "val_batch_size", 8, ""),
        ("output", "logs", "elsewhere", ""),
    ],
)
def test_settings_that_a_continued_run_leaves_out_are_named(section, key, value, change):
    tree = {section: {key: value}}
    if key == "early_stop":
        tree["evaluation"]["best_metric"] = "val/acc1"
    before = resolve(validate(tree, "here"), 2)
    found = changed_settings(before, resolve(RunConfig(), 2))
    assert sorted(found.split(", ")) == sorted(change.split(", "))


def test_changed_addresses_are_named_without_their_secrets():
    def asked(source):
        return resolve(validate({"evaluation": {"val_data": source}}, "here"), 2)

    before = asked("https://me:***@host/a.tar")  # as the run recorded it
    assert changed_settings(before, asked("https://me:secret@host/a.tar")) == ""
    assert "secret" not in changed_settings(before, asked("https://me:secret@host/b.tar"))
