"""`--no-duplicates`: orders in which no batch holds two samples of one component."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.data.distinct import Distinct
from neuclip.data.epoch_description import describe_distinct
from neuclip.data.order import Layout, Order, SourceSpan
from neuclip.errors import UserError


def order_of(components, batch, *, seed=0, blocks=1, **more):
    components = np.array(components)
    ends = np.linspace(0, len(components), blocks + 1).astype(np.int64)
    layout = Layout.of("d", np.diff(ends).tolist())
    return Order(layout, seed, distinct=Distinct(components, batch), **more)


def batches_of(order, batch, epoch=0):
    positions = order.positions(epoch, 0, order.length)
    return positions[: len(positions) // batch * batch].reshape(-1, batch)


def most_by_search(sizes, batch):
    """The most full batches without duplicates, by filling them from the largest components."""
    for batches in range(sum(sizes) // batch, 0, -1):
        room = [batch] * batches
        for size in sorted(sizes, reverse=True):
            for number in sorted(range(batches), key=lambda n: -room[n])[:size]:
                room[number] = max(0, room[number] - 1)
        if not any(room):
            return batches
    return 0


COMPONENTS = st.lists(st.integers(0, 11), min_size=1, max_size=60)


@given(COMPONENTS, st.integers(2, 6), st.integers(0, 2**40), st.integers(0, 3))
def test_no_batch_holds_two_of_a_component(components, batch, seed, epoch):
    sizes = Counter(components)
    most = most_by_search(list(sizes.values()), batch)
    if most == 0:
        with pytest.raises(UserError, match=f"a batch of {batch} pairs needs as many"):
            order_of(components, batch)
        return
    order = order_of(components, batch, seed=seed)
    batches = batches_of(order, batch, epoch)
    assert batches.shape == (most, batch) and order.length == most * batch
    assert len(set(batches.flat)) == batches.size  # each sample once
    for row in batches.tolist():
        assert len({components[position] for position in row}) == batch


def test_every_sample_is_visited_where_it_fits():
    components = [0] * 8 + list(range(1, 25))  # 32 samples, 8 batches of 4
    order = order_of(components, 4)
    assert sorted(batches_of(order, 4).flat) == list(range(32))
    assert "instead of" not in describe_distinct(order, Distinct(np.array(components), 4))


def test_of_a_group_that_is_too_large_each_epoch_drops_other_samples():
    components = [0] * 90 + list(range(1, 31))  # 90 of one, 30 alone
    order, distinct = order_of(components, 4), Distinct(np.array(components), 4)
    assert order.length == 40  # 10 batches: 1 of the large group and 3 others
    epochs = [set(order.positions(epoch, 0, 40).tolist()) for epoch in range(8)]
    assert all(set(range(90, 120)) <= each for each in epochs)
    assert len(set.union(*epochs)) > 70
    text = describe_distinct(order, distinct)
    assert "up to 90 samples" in text and "10 instead of 30 steps" in text
    assert "leaves 80 samples out" in text


def test_the_order_is_a_function_of_seed_and_epoch():
    components = (np.arange(200) // 3).tolist()
    first, again = order_of(components, 8), order_of(components, 8)
    expected = {epoch: first.positions(epoch, 0, first.length) for epoch in range(3)}
    for epoch in (2, 0, 1):  # as after a resume
        for start in (0, 8, 104):
            found = again.positions(epoch, start, start + 8)
            assert np.array_equal(found, expected[epoch][start : start + 8])
    assert not np.array_equal(expected[0], expected[1])
    other = order_of(components, 8, seed=1)
    assert not np.array_equal(other.positions(0, 0, 8), expected[0][:8])


def test_without_groups_every_pair_of_samples_meets_as_often():
    """Dealing must not make some batches likelier than others."""
    order, met = order_of(range(8), 2), Counter()
    for epoch in range(3000):
        for row in batches_of(order, 2, epoch).tolist():
            met[frozenset(row)] += 1
    expected = 3000 * 4 / 28
    assert len(met) == 28
    assert max(abs(count - expected) for count in met.values()) < 5 * expected**0.5


def test_a_group_is_spread_over_the_epoch():
    """Not in consecutive batches, where a pool would hold its other members."""
    components = [0] * 20 + list(range(1, 381))
    order, gaps = order_of(components, 4), []
    for epoch in range(20):
        where = np.flatnonzero((batches_of(order, 4, epoch) < 20).any(axis=1))
        assert len(where) == 20
        gaps += np.diff(where).tolist()
    assert np.mean(gaps) > 4  # 100 batches / 20 members = 5


def test_several_rounds_make_an_epoch():
    components = [0, 0, 1, 2, 3, 4, 5, 6]
    order = order_of(components, 4, length=22)
    batches = batches_of(order, 4)
    assert batches.shape == (5, 4)
    for start in (0, 2):  # whole rounds
        assert sorted(batches[start : start + 2].flat) == list(range(8))
    for row in batches.tolist():
        assert len({components[position] for position in row}) == 4
    assert not np.array_equal(batches[:2], batches[2:4])


def test_a_sample_that_a_mixture_repeats_is_its_own_duplicate():
    layout = Layout(np.array([4, 12]), (SourceSpan("a", 1, 4, 2.0), SourceSpan("b", 1, 8)))
    order = Order(layout, 0, distinct=Distinct(np.arange(12), 4))
    batches = batches_of(order, 4)
    assert Counter(batches.flat) == Counter([*range(4), *range(12)])
    assert all(len(set(row)) == 4 for row in batches.tolist())


@given(COMPONENTS, st.integers(2, 5), st.integers(1, 8), st.integers(1, 3), st.integers(0, 3))
def test_in_windows_duplicates_meet_only_where_they_must(components, batch, blocks, window, epoch):
    order = order_of(components, batch, blocks=blocks, window=window)
    distinct = Distinct(np.array(components), batch)
    plain = Order(order.layout, 0, window=window)
    assert order.length == plain.length == len(components)
    start = 0
    while start < order.length:
        stop = min(order.window_end(epoch, start), order.length)
        own = order.positions(epoch, start, stop)
        assert sorted(own) == sorted(plain.positions(epoch, start, stop))
        whole = stop // batch - -(-start // batch)  # batches inside of the window
        sizes = Counter(components[position] for position in own)
        if max(sizes.values()) <= whole:
            assert distinct.repeats(own, start) == 0
        start = stop


def test_repeats_are_counted_by_batch():
    distinct = Distinct(np.array([0, 0, 1, 1]), 2)
    assert distinct.repeats(np.array([0, 1, 2, 3])) == 2
    assert distinct.repeats(np.array([0, 2, 1, 3])) == 0
    assert distinct.repeats(np.array([0, 2, 3, 1]), place=1) == 1
