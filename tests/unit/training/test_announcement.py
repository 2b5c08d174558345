import pytest

from neuclip.config.data_sections import DataConfig
from neuclip.data.sources.source import Source
from neuclip.training import assemble


class Captions(Source):
    """A source of which only the captions matter."""

    def __init__(self, *captions):
        self._captions = captions

    def first_captions(self, samples=20):
        return list(self._captions)

    def _content(self, position):
        raise AssertionError

    locate = _content


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("random", "each visit draws one (--caption-choice first takes the first)"),
        ("first", "the first is read (--caption-choice random draws one for each visit)"),
    ],
)
def test_the_choice_among_several_captions_is_logged(caplog, monkeypatch, choice, words):
    monkeypatch.setattr(assemble.log, "propagate", True)
    with caplog.at_level("INFO"):
        assemble._announce_captions(
            Captions(("a", "b"), (), ("a", "b", "c")), DataConfig(caption_choice=choice)
        )
    assert caplog.messages == [f"captions: up to 3 per sample; {words}"]


@pytest.mark.parametrize("captions", [(), (("a",), ("b",)), ((),)])
def test_one_caption_is_not_worth_a_line(caplog, monkeypatch, captions):
    monkeypatch.setattr(assemble.log, "propagate", True)
    with caplog.at_level("INFO"):
        assemble._announce_captions(Captions(*captions), DataConfig())
    assert not caplog.messages


def test_keys_with_weights_are_logged_with_their_shares(caplog, monkeypatch):
    monkeypatch.setattr(assemble.log, "propagate", True)
    with caplog.at_level("INFO"):
        assemble._announce_captions(Captions(), DataConfig(caption_keys="title=3,long=1"))
    assert caplog.messages == ["captions: each visit draws one, by key: title 75%, long 25%"]
