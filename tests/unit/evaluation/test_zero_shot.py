import pytest
import torch

from neuclip.errors import UserError
from neuclip.evaluation import ranking
from neuclip.evaluation.zero_shot import OWN_RULES, class_vectors, classify, zero_shot_metrics


def naive(encoded, vectors):
    """acc1, acc5, mean per class recall and chance, by loops over samples and classes."""
    n, c = len(encoded), len(vectors)
    hits = {1: [], 5: []}
    labels_per_sample = []
    for i in range(n):
        labels = {
            int(encoded.class_indices[j])
            for j in range(n)
            if encoded.image_groups[i] == encoded.image_groups[j]
        }
        labels_per_sample.append(len(labels))
        scores = (vectors.double() @ encoded.image_features[i].double()).tolist()
        order = sorted(range(c), key=lambda k: -scores[k])
        for k in hits:
            hits[k].append(any(chosen in labels for chosen in order[:k]))
    recalls = []
    for k in set(encoded.class_indices.tolist()):
        mine = [
            h for h, own in zip(hits[1], encoded.class_indices.tolist(), strict=True) if own == k
        ]
        recalls.append(sum(mine) / len(mine))
    return {
        "acc1": sum(hits[1]) / n,
        "acc5": sum(hits[5]) / n,
        "mean_per_class_recall": sum(recalls) / len(recalls),
        "chance": sum(labels_per_sample) / n / c,
    }


def metrics_of(encoded, vectors, names):
    return zero_shot_metrics(classify(encoded, vectors, names, OWN_RULES))


def random_vectors(count: int, dim: int = 6):
    generator = torch.Generator().manual_seed(9)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


@pytest.mark.parametrize("at_once", [30, 2**22])
def test_agrees_with_loops(make_split, monkeypatch, at_once):
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 40, (90,), generator=generator)
    groups = raw.unique(return_inverse=True)[1].tolist()
    classes = torch.randint(0, 8, (90,), generator=generator).tolist()  # classes 8..11 are absent
    encoded = make_split(groups, [f"c{i}" for i in range(90)], classes)
    vectors = random_vectors(12)
    metrics = metrics_of(encoded, vectors, [f"name {i}" for i in range(12)])
    expected = naive(encoded, vectors)
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key
    assert metrics["main_metric"] == metrics["acc1"]
    assert (metrics["num_classes"], metrics["num_samples"]) == (12, 90)


def test_two_names_of_one_image_are_both_right(make_split):
    # Latin A and Greek Alpha: one image, classes 0 and 1. Class 2 has an image of its own.
    encoded = make_split([0, 0, 1], ["latin", "greek", "other"], [0, 1, 2])
    picture, other = encoded.image_features[0], encoded.image_features[2]
    away = -picture
    for chosen in (0, 1):
        vectors = torch.stack([away, away, other])
        vectors[chosen] = picture
        metrics = metrics_of(encoded, vectors, ["A", "Alpha", "B"])
        assert metrics["acc1"] == 1.0
        assert metrics["mean_per_class_recall"] == 1.0
    assert metrics["chance"] == pytest.approx((2 + 2 + 1) / 3 / 3)


def test_one_name_is_wrong_for_an_image_that_only_looks_alike(make_split):
    encoded = make_split([0, 1, 2], ["latin", "greek", "other"], [0, 1, 2])
    picture, other = encoded.image_features[0], encoded.image_features[2]
    encoded.image_features[1] = picture  # equal features, but another image
    metrics = metrics_of(encoded, torch.stack([picture, -picture, other]), ["A", "Alpha", "B"])
    assert metrics["acc1"] == pytest.approx(2 / 3)


def test_recall_is_a_mean_over_classes_not_over_samples(make_split):
    encoded = make_split([0, 1, 2, 3], list("abcd"), [0, 0, 0, 1])
    encoded.image_features[:] = torch.eye(6)[0]
    metrics = metrics_of(encoded, torch.eye(6)[:2], ["often", "seldom"])
    assert metrics["acc1"] == 0.75
    assert metrics["mean_per_class_recall"] == 0.5


def test_a_constant_model_is_never_right(make_split):
    encoded = make_split(
        list(range(20)), [f"c{i}" for i in range(20)], list(range(20)), constant=True
    )
    metrics = metrics_of(encoded, torch.eye(6)[:1].repeat(20, 1), [str(i) for i in range(20)])
    assert metrics["acc1"] == 0.0
    assert metrics["acc5"] == 0.0


def test_top5_needs_five_classes(make_split):
    encoded = make_split([0, 1], ["a", "b"], [0, 1])
    assert "acc5" not in metrics_of(encoded, random_vectors(4), list("abcd"))
    assert "acc5" in metrics_of(encoded, random_vectors(5), list("abcde"))


@pytest.mark.parametrize(("value", "text"), [(7, "has class 7"), (-1, "has no class")])
def test_a_class_without_a_name_is_an_error(make_split, value, text):
    encoded = make_split([0, 1], ["a", "b"], [0, value])
    with pytest.raises(UserError, match=f"'key1' {text}.*3 class names"):
        classify(encoded, random_vectors(3), list("abc"), OWN_RULES)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_class_vectors_are_normalised_means_of_normalised_features(encoder, batch_size):
    names, templates = ["latin a", "alpha", "{c} sign"], ["{c}", "a glyph of {c} , {c}", "the {c}"]
    vectors = class_vectors(encoder, names, templates, batch_size)
    for name, vector in zip(names, vectors, strict=True):
        total = torch.zeros(16, dtype=torch.double)
        for template in templates:
            text = name.join(template.split("{c}"))
            feature = encoder.encode_text(encoder.tokenize([text]))[0].double()
            total += feature / feature.norm()
        torch.testing.assert_close(vector.double(), total / total.norm(), atol=1e-6, rtol=0)
