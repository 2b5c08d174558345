import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.data.captions import CaptionRule, captions_of
from neuclip.data.samples import Unusable


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ("", ()),
        (" \n", ()),
        (" a cat \n", ("a cat",)),
        ("one\ntwo", ("one\ntwo",)),  # a text file is one caption
        ([], ()),
        (["a", " b "], ("a", "b")),
        (("a",), ("a",)),
        (["", None, "b"], ("b",)),
    ],
)
def test_a_value_is_a_text_or_a_list_of_texts(value, expected):
    assert captions_of(value) == expected


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (3, "a number"),
        (2.5, "a number"),
        (True, "true or false"),
        ({"raw": "a cat"}, "an object"),
        ([3], "a list with a number"),
        ([["a"]], "a list with a list"),
        (b"a cat", "of type bytes"),
    ],
)
def test_other_values_are_refused_with_their_place(value, named):
    with pytest.raises(Unusable, match=named) as error:
        captions_of(value, "column 'label'")
    assert error.value.kind == "caption_type" and "column 'label'" in error.value.detail


@pytest.mark.parametrize(
    ("written", "captions"),
    [
        ('["a cat", " a dog "]', ("a cat", "a dog")),
        ("['a cat', \"it's a dog\"]", ("a cat", "it's a dog")),  # as pandas writes a list
        ('["a", null]', ("a",)),
        ("[a] cat", ("[a] cat",)),
        ("[1]", ("[1]",)),
        ("a ['cat']", ("a ['cat']",)),
        ("[]", ()),
    ],
)
def test_a_list_in_a_csv_is_read_as_a_list(written, captions):
    assert CaptionRule(required=False).in_columns([written]).texts == captions
    drawn = CaptionRule(required=False, weights=(1.0,)).in_columns([written])
    assert drawn.texts == captions


@given(st.lists(st.text(alphabet="ab \n", max_size=4), max_size=4))
def test_json_and_tables_read_a_list_alike(captions):
    rule = CaptionRule(("k",), required=False)
    assert rule.read(json.dumps({"k": captions}).encode()) == captions_of(captions)


@pytest.mark.parametrize(
    ("keys", "record", "expected"),
    [
        ("b", {"a": "A", "b": "B"}, ("B",)),
        ("a;b", {"a": "A", "b": "B"}, ("A",)),
        ("a;b", {"a": " ", "b": ["B", "C"]}, ("B", "C")),
        ("a; b", {"a": None, "b": "B"}, ("B",)),
        ("a;b", {"a": []}, ()),
    ],
)
def test_of_several_keys_the_first_with_a_caption_is_read(keys, record, expected):
    rule = CaptionRule.for_key(keys)
    content = json.dumps(record).encode()
    if expected:
        assert rule.read(content) == expected
    else:
        with pytest.raises(Unusable) as error:
            rule.read(content)
        assert error.value.kind == "caption_empty"


def test_absent_keys_are_named():
    with pytest.raises(Unusable, match="no 'a' or 'b'") as error:
        CaptionRule.for_key("a;b").read(b'{"c": "C"}')
    assert error.value.kind == "caption_missing"


def test_an_absent_key_is_no_caption_where_none_is_required():
    assert CaptionRule(("a", "b"), required=False).read(b'{"c": "C"}') == ()


@pytest.mark.parametrize("content", [b"{", b"[" * 200_000])
def test_broken_json_is_a_corrupt_caption(content):
    with pytest.raises(Unusable) as error:
        CaptionRule.for_key("a").read(content)
    assert error.value.kind == "caption_json"


def test_lines_of_an_evaluation_set_are_captions():
    content = "\ufeffa dog\r\n\n two dogs \n".encode()
    assert CaptionRule(lines=True).read(content) == ("a dog", "two dogs")
    assert CaptionRule().read(content) == ("a dog\r\n\n two dogs",)


def test_captions_are_optional_where_nothing_needs_them():
    assert CaptionRule(required=False).read(b" \n") == ()
    with pytest.raises(Unusable, match="empty"):
        CaptionRule().read(b" \n")


WEIGHTED = CaptionRule(("a", "b", "c"), weights=(3.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("record", "texts", "weights"),
    [
        ({"a": "A", "b": "B", "c": "C"}, ("A", "B"), (3.0, 1.0)),
        ({"a": ["A", "AA"], "b": "B"}, ("A", "AA", "B"), (1.5, 1.5, 1.0)),  # they share 3
        ({"a": " ", "b": "B", "c": "C"}, ("B",), (1.0,)),
        ({"c": ["C", "CC"]}, ("C", "CC"), ()),  # weight 0 stands in
    ],
)
def test_keys_are_drawn_by_weight(record, texts, weights):
    assert WEIGHTED.in_file(json.dumps(record).encode()) == (texts, weights)
    columns = CaptionRule(weights=WEIGHTED.weights)
    assert columns.in_columns([record.get(key) for key in "abc"]) == (texts, weights)


def test_no_key_with_a_caption_is_a_corrupt_caption():
    for content, kind in ((b'{"a": ""}', "caption_empty"), (b"{}", "caption_missing")):
        with pytest.raises(Unusable) as error:
            WEIGHTED.in_file(content)
        assert error.value.kind == kind
