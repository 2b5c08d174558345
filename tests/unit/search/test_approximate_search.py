"""Approximate search: its recall is the measured one, and it belongs to its features."""

import sys

import numpy as np
import pytest
import torch
from given_features import write_store

from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.files import sha256
from neuclip.search.approximate_search import ApproximateSearch, sample_queries
from neuclip.search.exact_search import ExactSearch

pytest.importorskip("faiss")


class Towers:
    device = torch.device("cpu")
    tokenize = staticmethod(lambda texts: torch.tensor([[int(text.split()[1])] for text in texts]))

    def __init__(self, features):
        self._features = features

    def encode_image(self, images):
        raise AssertionError("no image is embedded")

    transform = encode_image

    def encode_text(self, tokens):
        noise = torch.randn(len(tokens), 24, generator=torch.Generator().manual_seed(0))
        rows = torch.from_numpy(self._features)[tokens[:, 0]]
        return torch.nn.functional.normalize(rows + 0.1 * noise, dim=1)


def drawn(rows, seed):
    numbers = np.random.default_rng(seed)
    found = numbers.standard_normal((rows, 8)) @ numbers.standard_normal((8, 24))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def features():
    return drawn(4000, seed=0)


@pytest.fixture(scope="module")
def images(features, tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("store") / "out", features, shard_samples=1500)
    return StoredImages.open(store)


@pytest.fixture(scope="module")
def built(images, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    samples = sample_queries(Towers(features), images, np.random.default_rng(0))
    return folder, ApproximateSearch.build(folder, images, samples)


def test_the_recall_is_that_of_a_naive_comparison(built, images, features):
    _, search = built
    record = search.record
    assert record.queries == {"texts": 200, "images": 200} and 1 < record.probes < record.lists
    rows = np.sort(np.random.default_rng(0).choice(4000, 400, replace=False))[1::2]
    scores = features[rows].astype(np.float64) @ features.T.astype(np.float64)
    both = 0
    for row, of_row in zip(rows.tolist(), scores, strict=True):
        right = [each for each in np.argsort(-of_row)[:11].tolist() if each != row][:10]
        found = search.nearest(torch.from_numpy(features[row]), 11).rows.tolist()
        both += len({*right} & {*found})
    assert record.recall["images"] == pytest.approx(both / 2000, abs=1e-4)
    assert 0.9 < record.recall["texts"] <= 1
    assert record.described.startswith("recall@10 ")


def test_scores_are_exact_and_the_order_too(built, images, features):
    _, search = built
    query = torch.from_numpy(features[7])
    found, exact = search.nearest(query, 20), ExactSearch(images).nearest(query, 20)
    np.testing.assert_allclose(found.scores, features[found.rows] @ features[7], atol=1e-6)
    assert (np.diff(found.scores) <= 0).all()
    assert found.rows[0] == exact.rows[0] == 7


def test_a_built_index_is_opened(built, images, features):
    folder, search = built
    opened = ApproximateSearch.open(folder, images)
    assert opened.record == search.record
    query = torch.from_numpy(features[3])
    assert np.array_equal(opened.nearest(query, 9).rows, search.nearest(query, 9).rows)
    assert ApproximateSearch.open(folder / "nowhere", images) is None


def test_an_index_of_other_features(built, tmp_path):
    folder, _ = built
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = StoredImages.open(write_store(tmp_path / "other", drawn(4000, seed=1)))
    with pytest.raises(UserError, match=r"is an index of other features \(\w+\) than .*: remove"):
        ApproximateSearch.open(folder, other)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("index.faiss", lambda content: content[:-1], "is damaged .another sum"),
        ("index.faiss", lambda content: b"", "is damaged .another sum"),
        ("index.faiss", None, r"has no index\.faiss"),
        ("index.json", lambda content: content[:50], "is damaged"),
        ("index.json", lambda content: b"{}", "is damaged"),
    ],
)
def test_a_damaged_index(built, images, tmp_path, name, change, words):
    folder = tmp_path / "index"
    folder.mkdir()
    for path in built[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(UserError, match=words):
        ApproximateSearch.open(folder, images)


def test_a_file_that_faiss_cannot_read(built, images, tmp_path):
    (tmp_path / "index.faiss").write_bytes(b"IwFlnothing")
    sums = {"file": sha256(tmp_path / "index.faiss")}
    record = built[1].record.model_copy(update=sums)
    (tmp_path / "index.json").write_text(record.model_dump_json())
    with pytest.raises(UserError, match="is damaged"):
        ApproximateSearch.open(tmp_path, images)


def test_few_images_without_captions(tmp_path, features, capfd):
    store = write_store(tmp_path / "out", features[:5], captions=[" "] * 5)
    images = StoredImages.open(store)
    samples = sample_queries(Towers(features), images, np.random.default_rng(0))
    search = ApproximateSearch.build(tmp_path / "index", images, samples)
    assert search.record.recall == {"images": 1.0} and search.record.lists == 1
    assert len(search.nearest(torch.from_numpy(features[0]), 9).rows) == 5
    assert "WARNING" not in "".join(capfd.readouterr())


def test_without_faiss(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"--index needs faiss.*pip install 'neuclip\[index\]'"):
        ApproximateSearch.build(tmp_path / "index", images, [])
