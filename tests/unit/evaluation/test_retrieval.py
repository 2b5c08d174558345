import pytest
import torch

from neuclip.evaluation import ranking
from neuclip.evaluation.retrieval import retrieve


def naive(encoded, k):
    """recall@k both ways, by loops over distinct captions and images."""
    n = len(encoded)
    pictures = {
        int(g): encoded.image_features[i]
        for i, g in reversed(list(enumerate(encoded.image_groups)))
    }
    captions = {c: encoded.text_features[i] for i, c in reversed(list(enumerate(encoded.captions)))}
    pairs = {(int(encoded.image_groups[i]), encoded.captions[i]) for i in range(n)}

    def recall(queries, candidates, together):
        hits = 0
        for query, feature in queries.items():
            ranked = sorted(
                candidates, key=lambda c: -float(candidates[c].double() @ feature.double())
            )
            hits += any(together(query, candidate) for candidate in ranked[:k])
        return hits / len(queries)

    return (
        recall(captions, pictures, lambda text, image: (image, text) in pairs),
        recall(pictures, captions, lambda image, text: (image, text) in pairs),
    )


@pytest.mark.parametrize("at_once", [50, 2**22])
def test_agrees_with_loops(make_split, monkeypatch, at_once):
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 30, (70,), generator=generator).unique(return_inverse=True)[1]
    captions = [f"caption {i}" for i in torch.randint(0, 40, (70,), generator=generator).tolist()]
    encoded = make_split(groups.tolist(), captions)
    result = retrieve(encoded)
    assert result.num_images == len(set(groups.tolist()))
    assert result.num_texts == len(set(captions))
    for k in (1, 5, 10):
        image_recall, text_recall = naive(encoded, k)
        assert 0 < image_recall + text_recall < 2
        assert result.image_recall[k] == pytest.approx(image_recall, abs=1e-12)
        assert result.text_recall[k] == pytest.approx(text_recall, abs=1e-12)
    metrics = result.metrics()
    assert metrics["image_retrieval_recall@5"] == result.image_recall[5]
    assert metrics["text_retrieval_recall@10"] == result.text_recall[10]
    assert metrics["mean_recall@1"] == (result.image_recall[1] + result.text_recall[1]) / 2


def test_any_of_several_captions_of_one_image_is_right(make_split):
    # Two images with two captions each; each image finds only its second caption.
    encoded = make_split([0, 0, 1, 1], ["a", "b", "c", "d"])
    a, b = torch.eye(6)[0], torch.eye(6)[1]
    encoded.image_features[:] = torch.stack([a, a, b, b])
    encoded.text_features[:] = torch.stack([b, a, a, b])
    # Each image likes a wrong caption as much as its right one: ties count against it.
    assert retrieve(encoded).text_recall[1] == 0.0
    encoded.text_features[2] = torch.eye(6)[2]
    assert retrieve(encoded).text_recall[1] == 0.5
    encoded.text_features[0] = torch.eye(6)[3]
    assert retrieve(encoded).text_recall[1] == 1.0
    assert retrieve(encoded).image_recall[1] == 0.5


def test_one_image_under_two_keys_is_one_candidate(make_split):
    # The same image twice with two captions: retrieving "the other" copy is right.
    encoded = make_split([0, 0, 1], ["latin a", "alpha", "b"])
    encoded.image_features[:] = torch.eye(6)[torch.tensor([0, 0, 1])]
    encoded.text_features[:] = torch.eye(6)[torch.tensor([0, 0, 1])]
    assert retrieve(encoded).image_recall[1] == 1.0


def test_a_constant_model_finds_nothing(make_split):
    encoded = make_split(list(range(12)), [f"c{i}" for i in range(12)], constant=True)
    assert set(retrieve(encoded).metrics().values()) == {0.0}


def test_a_k_that_takes_all_candidates_is_left_out(make_split):
    encoded = make_split([0, 1, 2, 3, 4], ["a", "b", "c", "d", "d"])
    metrics = retrieve(encoded).metrics()
    assert "image_retrieval_recall@1" in metrics
    assert "image_retrieval_recall@5" not in metrics  # five images
    assert "text_retrieval_recall@5" not in metrics  # four captions
    assert retrieve(make_split([0, 0], ["a", "b"])).metrics().keys() == {"text_retrieval_recall@1"}
