import threading

import numpy as np
import pytest
import torch

from datacomp_sets import picture
from neuclip.errors import UserError
from neuclip.search import query_vector
from neuclip.search.query_vector import QueryVectors, SearchQuery, combined, split_text


@pytest.mark.parametrize(
    ("text", "wanted", "avoided"),
    [
        ("a dog", "a dog", []),
        ("a dog -cat", "a dog", ["cat"]),
        ('-cat a   dog -"black and white" -red', "a dog", ["cat", "black and white", "red"]),
        ("a t-shirt, X-ray", "a t-shirt, X-ray", []),
        ("dog - cat", "dog - cat", []),
        ('dog -"" -" "', "dog", []),
        ("dog\n-cat", "dog", ["cat"]),
        ('dog -"cat', "dog", ['"cat']),
        ("-cat", "", ["cat"]),
        ("", "", []),
    ],
)
def test_words_to_avoid(text, wanted, avoided):
    assert split_text(text) == (wanted, avoided)


def test_the_mean_less_what_is_to_be_avoided():
    rows = torch.nn.functional.normalize(
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    wanted, avoided = rows[:3], rows[3:]
    mean = sum(row.double().numpy() for row in wanted) / 3
    less = sum(row.double().numpy() for row in avoided) / 2
    for found, vector in (
        (combined(wanted, avoided[:0]), mean),
        (combined(wanted, avoided), 2 * mean - less),
    ):
        np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=1e-6)
    assert torch.equal(combined(wanted[:1], avoided[:0]), wanted[0])


def test_the_latest_pictures_are_kept(images, towers, monkeypatch):
    monkeypatch.setattr(query_vector, "_KEPT", 2)
    vectors = QueryVectors(towers, images, threading.Lock())
    one, two = vectors.add(picture((1, 2, 3))), vectors.add(picture((4, 5, 6)))
    assert vectors.add(picture((1, 2, 3))) == one != two  # the same picture, now the latest
    vectors.add(picture((7, 8, 9)))
    assert vectors(SearchQuery(pictures=(one,)))[0].argmax() == 1
    with pytest.raises(UserError, match="no longer kept"):
        vectors(SearchQuery(pictures=(two,)))
