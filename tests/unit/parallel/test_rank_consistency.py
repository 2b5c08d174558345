"""Checks of a single process; tests/distributed/test_consistency_of_ranks.py has several."""

from neuclip.config.run_config import RunConfig
from neuclip.parallel import rank_consistency


def test_one_process_agrees_with_itself():
    rank_consistency.check_same_program(RunConfig().model_dump(mode="json"))
    rank_consistency.check_same_data(10, "abc", "def")


def test_the_digest_follows_the_source(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "notes.txt").write_text("not read")
    first = rank_consistency.source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("another")
    assert rank_consistency.source_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2")
    second = rank_consistency.source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, rank_consistency.source_digest(tmp_path)}) == 3
