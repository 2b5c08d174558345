import time

import pytest

from neuclip.data.patterns import expand_braces
from neuclip.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", []),
        ("a.tar", ["a.tar"]),
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{a,b{1..2}}", ["a", "b1", "b2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{x}", ["{x}"]),
        (r"\{1,2\}", ["{1,2}"]),
        ("a,b", ["a,b"]),
    ],
)
def test_the_names_of_a_pattern(pattern, names):
    assert expand_braces(pattern) == names


def test_sources_of_many_shards_are_added_not_multiplied():
    names = expand_braces("{laion/{00000..41455},coyo/{00000..40999},cc12m/{0000..1242}}.tar")
    assert len(names) == 41456 + 41000 + 1243


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999999}.tar",
        "{999999999..0..2}",
        "{-5000000..5000000}",
        "{0.." + "9" * 5000 + "}",
        "{a,{0..9999}{0..9999}}",
        "{0..99}" * 8,
        "{a,b}" * 40,
        "{a,{b,{0..2000000}}}",
    ],
)
def test_patterns_without_an_end_are_refused_at_once(pattern):
    start = time.monotonic()
    with pytest.raises(UserError, match="stands for more than 1,000,000 names"):
        expand_braces(pattern)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("pattern", ["{a,b", "{0..3}}", "{" * 15])
def test_unbalanced_braces_are_refused(pattern):
    with pytest.raises(UserError, match="unbalanced braces"):
        expand_braces(pattern)


@pytest.mark.parametrize("pattern", ["{" * 3000 + "}" * 3000, "{a," * 500 + "b" + "}" * 500])
def test_deep_braces_are_refused(pattern):
    with pytest.raises(UserError, match="nested more than 20 deep"):
        expand_braces(pattern)
