import pytest

from neuclip.errors import UserError
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.report.quoted import MEASURES, load_quoted, quoted_for


def test_every_number_is_quoted_with_its_source():
    rows = load_quoted()
    assert len({(row.source.name, row.method, row.data) for row in rows}) == len(rows)
    assert all(row.source.name and row.values for row in rows)
    assert all(0.1 < value < 0.8 for row in rows for value in row.values.values())
    assert MEASURES.keys() <= load_suite().members.keys()
    assert {row.source.second_hand for row in rows} == {True, False}
    assert all(("second-hand" in row.label) == row.source.second_hand for row in rows)


def test_the_numbers_of_a_data_set():
    found = {row.method: row.values for row in quoted_for("dfn14m")}
    assert found["NeuCLIP"] == pytest.approx({"datacomp": 0.3916})
    assert set(found) == {"OpenCLIP", "FastCLIP", "SigLIP", "AmorLIP", "NeuCLIP"}
    fastclip = {row.method: row.values for row in quoted_for("CC3M")}["FastCLIP-v1"]
    assert fastclip == pytest.approx(
        {"datacomp": 0.2487, "retrieval": 0.2928, "imagenet-variants": 0.1886}
    )


def test_unknown_data():
    with pytest.raises(UserError, match=r"no published numbers for training set 'CC4M'.*CC3M"):
        quoted_for("CC4M")
