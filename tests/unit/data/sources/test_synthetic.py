"""Random images and captions: as many as asked for, equal at every reading, and openable."""

import pickle

import pytest

from neuclip.data.opening import open_source
from neuclip.data.sources.source import content_digest
from neuclip.data.sources.synthetic import SyntheticSource
from neuclip.errors import UserError


def test_samples_depend_on_their_position_only():
    source = SyntheticSource("synthetic:40")
    copied = pickle.loads(pickle.dumps(source))
    read = [source.read(position) for position in range(40)]
    assert len(source) == 40
    assert [sample.captions for sample in read] == [copied.read(p).captions for p in range(40)]
    assert len({sample.captions for sample in read}) == 40
    assert len({sample.image.tobytes() for sample in read}) > 10
    assert read[3].image.tobytes() == copied.read(3).image.tobytes()
    assert (read[0].image.mode, read[0].image.size) == ("RGB", (256, 256))
    assert content_digest(source) != content_digest(SyntheticSource("synthetic:41"))


def test_the_source_opens_by_its_name_alone_and_among_others():
    source = open_source("synthetic:5")
    assert "random images and captions, 5 samples" in source.opened
    assert len(open_source("synthetic:5::synthetic:7")) == 12


@pytest.mark.parametrize("count", ["", "0", "x", "-3", "1.5"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(UserError, match="such as synthetic:10000"):
        open_source(f"synthetic:{count}")
