import pytest

from neuclip.evaluation.blend_choice import Mix, choose, has_barrier

TRADE_OFF = [Mix(0.0, 0.40, 0.60), Mix(0.3, 0.55, 0.58), Mix(0.6, 0.62, 0.54), Mix(1.0, 0.65, 0.30)]
PLATEAU = [Mix(0.0, 0.4, 0.6), Mix(0.5, 0.6, 0.6), Mix(0.8, 0.6, 0.6)]
BLIND = [Mix(0.0, 0.4), Mix(0.5, 0.7), Mix(1.0, 0.65)]


@pytest.mark.parametrize(
    ("mixes", "limit", "alpha"),
    [
        (TRADE_OFF, None, 0.6),  # means: 0.50, 0.565, 0.58, 0.475
        (TRADE_OFF, 0, 0.0),
        (TRADE_OFF, 1.9, 0.0),
        (TRADE_OFF, 2, 0.3),  # 0.60 - 0.02 is rounded, and 0.58 still counts
        (TRADE_OFF, 10, 0.6),
        (TRADE_OFF, 100, 1.0),
        (TRADE_OFF[::-1], 2, 0.3),  # in any order
        (PLATEAU, None, 0.5),  # equal: the nearest to the old model
        (PLATEAU[::-1], 0, 0.5),
        (BLIND, None, 0.5),
    ],
)
def test_choice(mixes, limit, alpha):
    assert choose(mixes, limit).alpha == alpha


@pytest.mark.parametrize(
    ("mixes", "expected"),
    [
        (TRADE_OFF, False),
        (BLIND, False),
        ([Mix(0.0, 0.1, 0.3), Mix(0.5, 0.1, 0.02), Mix(1.0, 0.4, 0.0)], True),
        ([Mix(0.0, 0.40), Mix(0.5, 0.37), Mix(1.0, 0.7)], True),
        ([Mix(0.0, 0.40), Mix(0.5, 0.39), Mix(1.0, 0.7)], False),  # within noise
        ([Mix(0.0, 0.40), Mix(0.5, 0.1), Mix(0.9, 0.7)], False),  # one end is unknown
    ],
)
def test_barrier(mixes, expected):
    assert has_barrier(mixes) is expected
