"""Groups of false negatives: ids, reading them once, and connected components."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.config.data_sections import ReadingConfig
from neuclip.data import groups as groups_module
from neuclip.data.groups import (
    Groups,
    Memberships,
    check_labels,
    components,
    image_id,
    read_groups,
    text_id,
)
from neuclip.data.opening import open_source


@pytest.mark.parametrize("text", ["A  cat\n on a mat", " a cat on a MAT ", "a cat on a mat"])
def test_captions_that_a_tokenizer_cannot_tell_apart_are_equal(text):
    assert text_id(text) == text_id("a cat on a mat") != text_id("a cat on a mat.")


def test_ids_are_64_bits_and_never_the_mark_of_no_group():
    assert text_id(" \n") == 0
    ids = [text_id(str(n)) for n in range(2000)] + [image_id(bytes([n])) for n in range(200)]
    assert 0 not in ids and len(set(ids)) == len(ids)
    assert min(ids) < 0 < max(ids) and all(-(2**63) <= each < 2**63 for each in ids)


def in_groups(samples, memberships):
    """Groups of one kind from (sample, id) pairs."""
    pairs = np.array(sorted(memberships), dtype=np.int64).reshape(-1, 2)
    return Groups(samples, {"caption": Memberships(pairs[:, 0], pairs[:, 1])})


def by_search(samples, memberships):
    """The least sample that each one reaches, by breadth-first search."""
    result = []
    for start in range(samples):
        seen, new = {start}, {start}
        while new:
            shared = {group for sample, group in memberships if sample in new}
            new = {sample for sample, group in memberships if group in shared} - seen
            seen |= new
        result.append(min(seen))
    return result


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(
    st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, 8)), max_size=20)
)))  # fmt: skip
def test_components_are_what_a_search_finds(case):
    samples, memberships = case
    found = components(in_groups(samples, memberships))
    assert found.tolist() == by_search(samples, memberships)


def test_a_long_chain_is_one_component():
    chain = [(n + side, n + 1) for n in range(4999) for side in (0, 1)]
    assert not components(in_groups(5000, chain)).any()


@pytest.fixture
def table(tmp_path, picture):
    """Five pairs: 0 and 1 share an image, 1 and 2 a caption, 3 and 4 a label."""
    images = [picture(1), picture(1), picture(2), picture(3), picture(4)]
    captions = [["a"], ["b", "c"], ["d", " C"], ["e"], ["f"]]
    labels = [None, "", 1, "x", "X"]
    lines = []
    for number, content in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(content)
        row = {"image": f"{number}.png", "captions": captions[number], "label": labels[number]}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "t.jsonl").write_text("".join(lines))
    return tmp_path / "t.jsonl"


def test_a_sample_belongs_to_the_groups_of_all_its_captions(table):
    reading = ReadingConfig(label_key="label")
    found = read_groups(open_source(str(table), reading), reading)
    assert {kind: len(each.ids) for kind, each in found.by_kind.items()} == {
        "caption": 7, "image": 5, "label": 3,
    }  # fmt: skip
    assert components(found).tolist() == [0, 0, 0, 3, 3]
    assert components(found, kinds=("caption",)).tolist() == [0, 1, 1, 3, 4]
    assert components(found, kinds=("image",)).tolist() == [0, 0, 2, 3, 4]
    assert components(found, kinds=("caption", "image")).tolist() == [0, 0, 0, 3, 4]


def test_groups_are_read_once_until_the_data_change(table, monkeypatch, picture):
    reading, counted = ReadingConfig(), []
    actual = groups_module.image_id
    monkeypatch.setattr(groups_module, "image_id", lambda c: counted.append(c) or actual(c))
    first, second = (read_groups(open_source(str(table)), reading) for _ in range(2))
    assert len(counted) == 5
    assert set(second.by_kind) == {"caption", "image"}  # no label key, no labels
    for kind, members in first.by_kind.items():
        assert np.array_equal(members, second.by_kind[kind])
    (table.parent / "4.png").write_bytes(picture(1) + b"\0")
    read_groups(open_source(str(table)), reading)
    assert len(counted) == 10
    read_groups(open_source(str(table)), reading, kinds=("caption",))
    assert len(counted) == 10  # captions are read without the images


def test_a_damaged_cache_is_read_again(table, own_cache):
    source = open_source(str(table))
    expected = components(read_groups(source, ReadingConfig()))
    (file,) = (own_cache / "neuclip" / "groups").iterdir()
    for damaged in (b"", file.read_bytes()[:-40], b"\0" * 300):
        file.write_bytes(damaged)
        assert components(read_groups(source, ReadingConfig())).tolist() == expected.tolist()
        assert len(file.read_bytes()) > 300


def test_corrupt_samples_are_counted_and_alone(table, caplog):
    (table.parent / "1.png").unlink()
    found = read_groups(open_source(str(table)), ReadingConfig())
    assert found.unreadable == 1 and "1 corrupt sample" in caplog.text
    assert components(found).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        ("abcde", "labels of 5 samples tried all differ"),
        ([""] * 5, "tried have none"),
        ("aabcd", ""),
    ],
)
def test_labels_that_join_nothing_are_said(table, caplog, labels, warning):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_labels(open_source(str(table), ReadingConfig(label_key="label")), "label")
    assert warning in caplog.text and bool(warning) == bool(caplog.text)
