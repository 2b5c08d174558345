"""Starting a run folder, and finding what to resume."""

import pytest

from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError
from neuclip.training.open_run import earlier_config, open_run_folder


def test_an_existing_run_needs_resume(tmp_path):
    folder, start = open_run_folder(str(tmp_path), "run", None)
    assert start is None
    folder.config.write_text("name: run\n")
    with pytest.raises(UserError, match="already holds a run; continue it with --resume auto"):
        open_run_folder(str(tmp_path), "run", None)
    assert open_run_folder(str(tmp_path), "run", "latest") == (folder, None)
    folder.latest.write_bytes(b"x")
    assert open_run_folder(str(tmp_path), "run", "latest")[1].path == folder.latest


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        open_run_folder(str(tmp_path / "file"), "run", None)


def test_the_settings_of_the_run_to_resume(tmp_path):
    folder, _ = open_run_folder(str(tmp_path), "run", None)
    assert earlier_config(str(tmp_path), "run", "auto") is None
    folder.config.write_text(RunConfig(seed=7).to_yaml())
    assert earlier_config(str(tmp_path), "run", None) is None
    for resume in ("auto", "latest", str(folder.checkpoints / "epoch_1.pt")):
        earlier = earlier_config(str(tmp_path), "run", resume)
        assert earlier is not None
        assert earlier.seed == 7
    folder.config.write_text("seed: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        earlier_config(str(tmp_path), "run", "auto")
