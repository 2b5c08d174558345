"""What processes compare; how they disagree is in tests/distributed/test_group.py."""

import pytest

from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError
from neuclip.parallel import rank_consistency


@pytest.fixture
def everyone(monkeypatch):
    """What the processes are made to say, in place of what one process hears from itself."""
    heard = []
    monkeypatch.setattr(rank_consistency.collectives, "gather_objects", lambda mine: [mine, *heard])
    return heard


def test_one_process_agrees_with_itself(everyone):
    rank_consistency.check_same_program(RunConfig().model_dump(mode="json"))
    rank_consistency.check_same_data(10, "abc")


def test_a_setting_that_differs_is_named(everyone, monkeypatch):
    said = []
    monkeypatch.setattr(
        rank_consistency.collectives, "gather_objects", lambda mine: said.append(mine) or said
    )
    rank_consistency.check_same_program(RunConfig().model_dump(mode="json"))
    with pytest.raises(UserError, match=r"setting seed: 0 on process 0 \(.*\); 4 on process 1"):
        rank_consistency.check_same_program(RunConfig(seed=4).model_dump(mode="json"))


def test_machines_may_have_their_own_cache(monkeypatch):
    said = []
    monkeypatch.setattr(
        rank_consistency.collectives, "gather_objects", lambda mine: said.append(mine) or said
    )
    for cache in ("/scratch/a", "/scratch/b"):
        rank_consistency.check_same_program(
            RunConfig.model_validate({"data": {"cache_dir": cache}}).model_dump(mode="json")
        )
    assert len(said) == 2


def test_other_data_are_named(everyone):
    everyone.append(("node-b", {"number of samples": "9", "digest of the data's index": "abc"}))
    with pytest.raises(
        UserError, match=r"number of samples: 10 on process 0 .*; 9 on process 1 \(node-b\)"
    ):
        rank_consistency.check_same_data(10, "abc")


def test_a_long_list_is_cut(everyone):
    everyone.append(("node-b", {}))
    with pytest.raises(UserError, match="and 3 more"):
        rank_consistency.check_same({str(number): "1" for number in range(8)})


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
