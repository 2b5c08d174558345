"""The sampler: every sample its share of visits, whatever is cut where."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip.data.epoch_description import describe_epoch
from neuclip.data.order import Layout, Order, SourceSpan

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 2**31)


def order_of(sizes, seed=0, **more):
    return Order(Layout.of("x", sizes), seed, **more)


def mixed(*parts):
    """A layout of parts (sizes of blocks, factor)."""
    sizes = [size for blocks, _ in parts for size in blocks]
    return Layout(
        np.cumsum(sizes),
        tuple(SourceSpan(str(n), len(b), sum(b), factor) for n, (b, factor) in enumerate(parts)),
    )


def epoch(order, number=0):
    return order.positions(number, 0, order.length).tolist()


@settings(deadline=None)
@given(sizes=SIZES, window=st.integers(0, 10), seed=SEEDS, number=st.integers(0, 5))
def test_every_sample_once_per_epoch(sizes, window, seed, number):
    order = order_of(sizes, seed, window=window)
    assert sorted(epoch(order, number)) == list(range(sum(sizes)))


@settings(deadline=None)
@given(sizes=SIZES, window=st.integers(0, 10), length=st.integers(1, 250), seed=SEEDS)
def test_no_sample_again_before_all_have_come(sizes, window, length, seed):
    seen = epoch(order_of(sizes, seed, window=window, length=length))
    samples = sum(sizes)
    assert len(seen) == length
    for start in range(0, length, samples):
        span = seen[start : start + samples]
        assert len(set(span)) == len(span)


@settings(deadline=None)
@given(
    sizes=SIZES,
    window=st.integers(0, 10),
    length=st.integers(1, 200),
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=5),
)
def test_any_place_is_reached_without_what_came_before(sizes, window, length, cuts):
    """Resume: a fresh order gives at any place what one that read from the start gives."""
    whole = [epoch(order_of(sizes, 7, window=window, length=length), n) for n in range(2)]
    order = order_of(sizes, 7, window=window, length=length)
    for start, count in cuts:
        stop = min(start + count, length)
        for number in (1, 0):
            got = order.positions(number, min(start, length), stop).tolist()
            assert got == whole[number][start:stop]


@settings(deadline=None)
@given(
    sizes=SIZES,
    window=st.integers(0, 10),
    world=st.sampled_from([1, 2, 4, 8]),
    epochs=st.integers(1, 3),
)
def test_ranks_share_one_order(sizes, window, world, epochs):
    """The same global batches for any number of processes, each with an order of its own."""
    whole = order_of(sizes, 3, window=window)
    ranks = [order_of(sizes, 3, window=window) for _ in range(world)]
    for number in range(epochs):
        expected = epoch(whole, number)
        for step in range(len(expected) // 8):
            size = 8 // world
            batch = [
                position
                for rank, order in enumerate(ranks)
                for position in order.positions(
                    number, step * 8 + rank * size, step * 8 + (rank + 1) * size
                ).tolist()
            ]
            assert batch == expected[step * 8 : step * 8 + 8]


@settings(deadline=None)
@given(sizes=SIZES, window=st.integers(1, 10), seed=SEEDS, length=st.integers(1, 200))
def test_a_window_reads_from_few_blocks_and_they_are_known(sizes, window, seed, length):
    order = order_of(sizes, seed, window=window, length=length)
    seen = epoch(order)
    place = 0
    told = set()
    while place < length:
        end = order.window_end(0, place)
        ahead = order.blocks_ahead(0, place)
        inside = {order.layout.block(position) for position in seen[place:end]}
        assert inside <= set(ahead[:window])
        assert place == 0 or inside <= told  # it was told one window before
        assert len(ahead) <= 2 * window
        told = set(ahead)
        for attempt in range(1, 4):
            other = order.substitute(0, place, attempt)
            assert order.layout.block(other) in set(ahead[:window])
        assert end > place
        place = end
    first_of_next = epoch(order, 1)[: order.window_end(1, 0)]
    assert {order.layout.block(position) for position in first_of_next} <= told


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=SEEDS)
def test_substitutes_reach_every_sample_of_a_window(sizes, seed):
    order = order_of(sizes, seed, window=len(sizes))
    drawn = {order.substitute(0, 0, attempt) for attempt in range(sum(sizes) * 25)}
    assert drawn == set(range(sum(sizes)))


FACTORS = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.25])


@settings(deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), FACTORS),
        min_size=1,
        max_size=4,
    ),
    window=st.integers(0, 9),
    seed=SEEDS,
)
def test_factors_are_exact(parts, window, seed):
    layout = mixed(*parts)
    if layout.visits == 0:
        return
    order = Order(layout, seed, window=window)
    for number in range(2):
        counts = Counter(epoch(order, number))
        start = 0
        for span in layout.spans:
            visits = [counts[position] for position in range(start, start + span.samples)]
            assert sum(visits) == span.full_visits * span.samples + span.extra_visits == span.visits
            assert set(visits) <= {span.full_visits, span.full_visits + 1}
            start += span.samples
    # A longer epoch is more such rounds.
    longer = Order(layout, seed, window=window, length=2 * layout.visits)
    first, second = np.split(np.array(epoch(longer)), 2)
    for half in (first, second):
        assert Counter(Counter(half.tolist()).values()).total() <= layout.samples
        assert len(half) == layout.visits
    assert sorted(first.tolist()) == sorted(epoch(order))


def test_other_samples_repeat_in_each_round():
    order = Order(mixed(([50, 50], 0.5)), 1, window=1)
    rounds = [frozenset(epoch(order, number)) for number in range(5)]
    assert len(set(rounds)) == 5
    assert all(len(each) == 50 for each in rounds)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_seeds_and_epochs_differ(window):
    orders = {
        tuple(epoch(order_of([9] * 6, seed, window=window), number))
        for seed in range(4)
        for number in range(4)
    }
    assert len(orders) == 16


def test_windowed_order_is_the_same_everywhere():
    # A changed order would make runs resume with other data than they were started with.
    order = order_of([3, 1, 2, 3], 2026, window=2)
    assert epoch(order, 3) == [6, 3, 8, 7, 1, 4, 2, 5, 0]
    assert epoch(Order(mixed(([3, 2], 1.0), ([4], 1.5)), 2026), 1) == [
        6,
        5,
        8,
        0,
        7,
        6,
        2,
        3,
        4,
        8,
        1,
    ]


def test_order_travels_to_other_processes_without_its_memory():
    order = order_of([1000] * 50, 1, window=10)
    expected = epoch(order)
    packed = pickle.dumps(order)
    assert len(packed) < 5000
    assert epoch(pickle.loads(packed)) == expected


def test_description_of_a_mixture():
    layout = mixed(([60, 40], 1.0), ([50], 2.5), ([80], 0.25))
    text = describe_epoch(layout, layout.visits, 20)
    assert text == (
        "an epoch is 240 samples: 12 steps of 20; that is 240 visits of a round; a round is 245 "
        "visits: 0: each of 100 samples 1 time, 1: each of 50 samples 2 times, 25 once more, "
        "2: a different 20 of 80 samples each round"
    )
    assert "that is 2 rounds and 10 visits of the next" in describe_epoch(layout, 500, 20)
