"""What processes compare; how they disagree is in tests/distributed/test_group.py."""

import pytest

from neuclip.config import RunConfig
from neuclip.errors import UserError
from neuclip.training import agreement


@pytest.fixture
def everyone(monkeypatch):
    """What the processes are made to say, in place of what one process hears from itself."""
    heard = []
    monkeypatch.setattr(agreement.distributed, "gather_objects", lambda mine: [mine, *heard])
    return heard


def test_one_process_agrees_with_itself(everyone):
    agreement.check_same_program(RunConfig())
    agreement.check_same_data(10, "abc")


def test_a_setting_that_differs_is_named(everyone, monkeypatch):
    said = []
    monkeypatch.setattr(
        agreement.distributed, "gather_objects", lambda mine: said.append(mine) or said
    )
    agreement.check_same_program(RunConfig())
    with pytest.raises(UserError, match=r"setting seed: 0 on process 0 \(.*\); 4 on process 1"):
        agreement.check_same_program(RunConfig(seed=4))


def test_machines_may_have_their_own_cache(monkeypatch):
    said = []
    monkeypatch.setattr(
        agreement.distributed, "gather_objects", lambda mine: said.append(mine) or said
    )
    for cache in ("/scratch/a", "/scratch/b"):
        agreement.check_same_program(RunConfig.model_validate({"data": {"cache_dir": cache}}))
    assert len(said) == 2


def test_other_data_are_named(everyone):
    everyone.append(("node-b", {"number of samples": "9", "digest of the data's index": "abc"}))
    with pytest.raises(
        UserError, match=r"number of samples: 10 on process 0 .*; 9 on process 1 \(node-b\)"
    ):
        agreement.check_same_data(10, "abc")


def test_a_long_list_is_cut(everyone):
    everyone.append(("node-b", {}))
    with pytest.raises(UserError, match="and 3 more"):
        agreement.check_same({str(number): "1" for number in range(8)})


def test_the_digest_follows_the_source(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "notes.txt").write_text("not read")
    first = agreement.source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("another")
    assert agreement.source_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2")
    second = agreement.source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, agreement.source_digest(tmp_path)}) == 3
