"""Duplicates in `neuclip data inspect`."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.cli.app import main
from neuclip.data.samples import Annotations, Sample
from neuclip.data.tools.duplicates import Duplicates, duplicate_facts

IDS = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 2))


@given(st.lists(IDS, min_size=2, max_size=20), st.integers(2, 9))
def test_the_expected_number_of_pairs_is_that_of_a_loop(ids, batch):
    pairs = list(combinations(ids, 2))
    agree = sum(any(a == b != 0 for a, b in zip(*pair, strict=True)) for pair in pairs)
    found = Duplicates(ids)
    assert found.pair_share == pytest.approx(agree / len(pairs))
    assert found.expected(batch) == pytest.approx(agree / len(pairs) * batch * (batch - 1) / 2)
    for kind in range(3):
        own = [each[kind] for each in ids if each[kind]]
        assert found.given(kind) == len(own)
        assert found.sharing(kind) == sum(own.count(each) > 1 for each in own)


def facts(captions, labels=None):
    found = Duplicates()
    for number, caption in enumerate(captions):
        label = labels[number] if labels else ""
        found.add(Sample("k", number + 1, (caption,), annotations=Annotations(label=label)))
    return dict(duplicate_facts(found))


def test_what_is_said_of_duplicates():
    lines = facts(["a", "A ", "b", "c"])
    assert lines["equal captions"] == "2 of 4 read share theirs with another (3 different)"
    assert lines["equal images"] == "none among 4 read"
    assert lines["false negatives"].startswith("expected pairs in a batch: 336 in 64, 5,440 in 256")
    assert lines["false negatives"].endswith("in a pool of 8,192: 1,365")
    assert "batches of up to 2)" in lines["what helps"]
    assert "equal labels" not in lines


def test_labels_that_join_all_or_nothing_are_named():
    assert facts("abc", "xxx")["equal labels"].startswith("all 3 are equal")
    assert facts("abc", "xyz")["equal labels"] == "none, all 3 differ: --label-key changes nothing"
    assert facts("abc")["false negatives"] == "none among the samples read"


def test_inspect_reads_labels(tmp_path, picture, capsys):
    rows = ["filepath,title,kind"]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number % 3))
        rows.append(f"{number}.png,text {number},{number // 2}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    page = tmp_path / "page.html"
    command = ["data", "inspect", str(tmp_path / "t.csv"), "--label-key", "kind"]
    assert main([*command, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    for line in ("2 of 4 read share theirs with another (3 different)", "4 of 4 read share"):
        assert line in printed and line in page.read_text()
    assert "--no-duplicates out of the batches" in page.read_text()
