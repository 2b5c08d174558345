"""Which process opens the data when."""

import pytest

from neuclip.data.sources.source import Source
from neuclip.parallel.launch import Launch
from neuclip.training import assemble


class Nothing(Source):
    def content(self, position):
        raise NotImplementedError

    def locate(self, position):
        raise NotImplementedError


@pytest.fixture
def events(monkeypatch):
    events = []
    monkeypatch.setattr(assemble.collectives, "barrier", lambda: events.append("wait"))
    return events


def as_rank(monkeypatch, rank, local_rank):
    monkeypatch.setattr(assemble.collectives, "is_main", lambda: rank == 0)
    launch = Launch(rank, 4, local_rank)
    monkeypatch.setattr(assemble, "launch_environment", lambda: launch)


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (2, 0, 1), (1, 1, 2)])
def test_data_are_opened_in_turn(monkeypatch, events, rank, local_rank, turn):
    as_rank(monkeypatch, rank, local_rank)
    source = Nothing()

    def open_data():
        events.append("open")
        return source

    assert assemble._in_turn(open_data) is source
    assert events == ["wait"] * turn + ["open"] + ["wait"] * (3 - turn)
