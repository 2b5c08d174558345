import random

import pytest

from neuclip.data.sources.source import Texts
from neuclip.errors import UserError
from neuclip.search.caption_filter import CaptionFilter

CAPTIONS = [
    "A red Dog",
    "",
    "dog\n and  cat",
    "STRASSE",
    "naïve\udcff dog",
    "a.c",
    "abc",
    "ends in do",
]


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("dog", [0, 2, 4]),
        ("DOG and\tCAT", [2]),
        ("straße", [3]),
        ("a.c", [5]),
        ("NAÏVE", [4]),
        ("dog naive", []),
        ("do g", []),
        ("g", [0, 2, 4]),
    ],
)
def test_parts_of_captions(part, rows):
    assert CaptionFilter(Texts(CAPTIONS)).rows(part).tolist() == rows


def test_against_the_naive_way():
    numbers = random.Random(0)
    captions = ["".join(numbers.choices("ab ", k=numbers.randrange(8))) for _ in range(300)]
    found = CaptionFilter(Texts(captions))
    for part in ("a", "ab", "b a", "aab", "bb bb"):
        expected = [row for row, text in enumerate(captions) if part in " ".join(text.split())]
        assert found.rows(part).tolist() == expected


def test_a_part_that_is_too_long():
    with pytest.raises(UserError, match="more than 1,000 characters"):
        CaptionFilter(Texts(CAPTIONS)).rows("x" * 1001)
