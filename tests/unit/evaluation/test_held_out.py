"""A held-out share: by group, never a leak, a function of seed and data."""

from dataclasses import replace

import numpy as np
import pytest

from neuclip.config.data_sections import ReadingConfig
from neuclip.data import groups
from neuclip.data.groups import components, read_groups
from neuclip.data.opening import open_source
from neuclip.data.order import Order
from neuclip.data.sources.part import Part
from neuclip.data.sources.source import content_digest
from neuclip.errors import UserError
from neuclip.evaluation.held_out import choose_held_out, hold_out

READING = ReadingConfig()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Groups that are read stay in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_stay_whole_and_the_share_is_not_exceeded(share, seed):
    number = np.random.default_rng(seed).integers(0, 90, 400)
    held = choose_held_out(number, share, seed)
    assert len(held) == len(set(held.tolist())) == pytest.approx(share * 400, abs=8)
    assert len(held) <= round(share * 400)
    rest = np.setdiff1d(np.arange(400), held)
    assert not set(number[held]) & set(number[rest])
    assert np.array_equal(held, choose_held_out(number, share, seed))
    assert not np.array_equal(held, choose_held_out(number, share, seed + 1))


def test_a_group_above_the_share_is_trained_on():
    number = np.array([7] * 90 + list(range(100, 110)))
    assert set(choose_held_out(number, 0.1, 0).tolist()) == set(range(90, 100))


@pytest.fixture
def table(tmp_path):
    """Twelve pairs: two captions each, images and captions that repeat, and chains of both."""
    from PIL import Image

    rows = ["filepath,title"]
    for number in range(12):
        color = (number * 20, 10, 30)
        if number == 3:
            color = (0, 10, 30)  # the image of row 0
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{number}.png")
        caption = {5: "a 3", 7: "a 6"}.get(number, f"a {number}")
        rows.append(f"{number}.png,{caption}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def test_samples_that_share_a_caption_or_an_image_are_one_group(table):
    number = components(read_groups(open_source(str(table)), READING))
    together = [np.flatnonzero(number == each).tolist() for each in np.unique(number)]
    assert sorted(group for group in together if len(group) > 1) == [[0, 3, 5], [6, 7]]


def test_no_held_out_caption_or_image_is_trained_on(table):
    source = open_source(str(table))
    for seed in range(20):
        held = hold_out(source, READING, 0.4, seed)
        sides = [
            {s.captions for s in part} | {s.image for s in part}
            for part in (
                [held.split.index.content(p) for p in range(len(held.split.index))],
                [held.rest.content(p) for p in range(len(held.rest))],
            )
        ]
        assert not sides[0] & sides[1]
        assert len(held.split.index) + len(held.rest) == 12
        assert held.digest == hold_out(source, READING, 0.4, seed).digest


def test_groups_of_the_rest_need_no_second_pass(table, monkeypatch):
    """The images are read once for the share and for `--no-duplicates`."""
    counted, actual = [], groups.image_id
    monkeypatch.setattr(groups, "image_id", lambda content: counted.append(1) or actual(content))
    held = hold_out(open_source(str(table)), READING, 0.3, 1)
    found = components(held.groups_of_rest(READING))
    other = replace(held, all_groups=None)  # another process, which finds them in the cache
    assert np.array_equal(found, components(other.groups_of_rest(READING)))
    assert len(counted) == 12
    assert np.array_equal(found, components(read_groups(held.rest, READING)))
    assert len(np.unique(found)) < len(found)


def test_errors_name_the_remedy(table):
    source = open_source(str(table))
    with pytest.raises(UserError, match="holds out 1, and an evaluation needs at least 2"):
        hold_out(source, READING, 0.1, 0)
    with pytest.raises(UserError, match="leaves 6 samples to train on, less than a batch of 8"):
        hold_out(source, READING, 0.5, 3).check_batch(8)
    hold_out(source, READING, 0.5, 3).check_batch(6)


def test_equal_captions_everywhere_leave_nothing_to_hold_out(table):
    text = table.read_text().splitlines()
    table.write_text("\n".join([text[0], *(row.split(",")[0] + ",same" for row in text[1:])]))
    with pytest.raises(UserError, match=r"holds out 0 instead of 6: .* only 1 group"):
        hold_out(open_source(str(table)), READING, 0.5, 0)


def test_a_part_keeps_blocks_and_spans(demo_dir):
    joined = f"{demo_dir / 'train'}::{demo_dir / 'unseen_face_test'}"
    source = open_source(joined)
    positions = np.arange(3, len(source), 3, dtype=np.int64)
    part = Part(source, positions)
    layout = part.layout
    assert len(layout.ends) == len(source.layout.ends)
    assert sum(span.samples for span in layout.spans) == layout.samples == len(positions)
    assert [part.content(p) for p in (0, 7)] == [source.content(p) for p in (3, 24)]
    # An epoch with windows visits each sample once, and replaces a sample by one of the part.
    order = Order(layout, 0, window=2)
    assert sorted(order.positions(0, 0, len(part)).tolist()) == list(range(len(part)))
    assert 0 <= order.substitute(0, 5, 1) < len(part)
    assert part.locate(0) == source.locate(3)
    assert part.sample_id(1) == 1


def test_a_part_of_keyed_shards_keeps_the_keys(demo_dir):
    source = open_source(str(demo_dir / "train"))
    part = Part(source, np.array([4, 9]), ids_are_keys=True)
    assert [part.sample_id(0), part.sample_id(1)] == [source.sample_id(4), source.sample_id(9)]


def test_parts_of_one_source_differ_in_their_digest(demo_dir):
    source = open_source(str(demo_dir / "train"))
    parts = [Part(source, np.array(positions)) for positions in ([1, 2], [1, 3], [1, 2])]
    first, other, same = map(content_digest, parts)
    assert first == same != other


def test_remote_data_are_refused(monkeypatch):
    source = open_source("synthetic:20")
    monkeypatch.setattr(source, "file_of", lambda _: "https://example.org/0.tar")
    with pytest.raises(UserError, match="is not on this machine: download the data first"):
        hold_out(source, READING, 0.5, 0)
