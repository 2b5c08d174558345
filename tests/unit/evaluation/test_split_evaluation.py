import base64
import io
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from neuclip.errors import UserError
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.normalizer_error import exact_log_normalizers
from neuclip.evaluation.splits import open_split

SETTINGS = EvaluationSettings(batch_size=3, workers=0)
ZERO_SHOT = {"acc1", "acc5", "mean_per_class_recall", "num_classes", "num_samples", "chance"}
NORMALIZERS = {
    f"{prefix}normalizer_{kind}" for prefix in ("", "minibatch_") for kind in ("mse", "mae", "bias")
}


class BatchLoss(nn.Module):
    epsilon = 1e-8
    predicts_log_normalizers = True

    def full_state(self):
        return nullcontext()

    def predict_log_normalizers(self, image_features, text_features, logit_scale, sample_ids=None):
        assert sample_ids is None
        both = exact_log_normalizers(image_features, text_features, float(logit_scale), 1e-8)
        return both.float()


class LossWithout(BatchLoss):
    predicts_log_normalizers = False


class BrokenLoss(BatchLoss):
    def predict_log_normalizers(self, image_features, text_features, logit_scale, sample_ids=None):
        raise UserError("features of 16 dimensions, expected 32")


def evaluate_folder(encoder, folder, settings=SETTINGS, loss=None):
    model = EvaluatedModel(encoder, loss, 10.0, train_batch_size=3)
    return evaluate(model, open_split(folder), settings)


def test_everything_from_one_pass(encoder, small_split):
    metrics = evaluate_folder(encoder, small_split, loss=BatchLoss()).metrics
    assert encoder.images_seen == 7
    assert encoder.texts_seen == 7 + 7 * 2  # captions, and two prompts for each of seven classes
    assert metrics.keys() >= ZERO_SHOT | NORMALIZERS | {"main_metric", "mean_recall@1"}
    assert metrics.keys() >= {"image_retrieval_recall@5", "text_retrieval_recall@5"}
    assert metrics["num_samples"] == 7
    assert metrics["chance"] == pytest.approx((2 + 2 + 5) / 7 / 7)
    assert metrics["normalizer_batch_size"] == 3
    assert metrics["normalizer_mse"] == pytest.approx(metrics["minibatch_normalizer_mse"], rel=1e-3)
    assert all(type(value) is float for value in metrics.values())


class Perfect:
    """Knows which image each name belongs to, by the color."""

    device = torch.device("cpu")

    def __init__(self, encoder, names_of_color):
        self.encoder, self.names_of_color = encoder, names_of_color

    @property
    def transform(self):
        return self.encoder.transform

    def tokenize(self, texts):
        numbers = [[int(text.endswith(name)) for name in self.names] for text in texts]
        return torch.tensor(numbers)

    @property
    def names(self):
        return [name for names in self.names_of_color.values() for name in names]

    def encode_text(self, tokens):
        groups = [n for n, names in enumerate(self.names_of_color.values()) for _ in names]
        vectors = torch.zeros(len(tokens), 6)
        return vectors.index_add_(1, torch.tensor(groups), tokens.float())

    def encode_image(self, images):
        colors = (images[:, :, 0, 0] * 255).round().int().tolist()
        order = [list(self.names_of_color).index(tuple(color)) for color in colors]
        return torch.eye(6)[order]


def test_two_names_share_one_image(encoder, tmp_path, write_split):
    # A model that cannot tell the two names apart, because nobody can, loses nothing by it
    # in retrieval of images; as a class, the two tie, and both are right.
    colors = [(i, 0, 0) for i in range(6)]
    names = [["latin a", "greek alpha"], ["be"], ["ce"], ["de"], ["ef"], ["ge"]]
    model = Perfect(encoder, dict(zip(colors, names, strict=True)))
    flat = [(color, name) for color, group in model.names_of_color.items() for name in group]
    samples = [(f"{i}", color, f"the {name}", i) for i, (color, name) in enumerate(flat)]
    folder = write_split(tmp_path / "s", samples, [name for _, name in flat], ["{c}", "a {c}"])
    metrics = evaluate_folder(model, folder).metrics
    assert metrics["acc1"] == 1.0
    assert metrics["mean_per_class_recall"] == 1.0
    assert metrics["image_retrieval_recall@1"] == 1.0
    assert metrics["text_retrieval_recall@1"] == 1.0


def test_captions_that_are_cut_off_and_progress(encoder, tmp_path, write_split, log):
    class Short:
        """Reads three words."""

        context_length = 3

        def __call__(self, texts, context_length=3):
            return encoder.tokenize(texts)[:, :context_length]

    reader, seen = Perfect(encoder, {}), []
    reader.tokenize, reader.encode_text = Short(), encoder.encode_text
    reader.encode_image = encoder.encode_image
    samples = [(f"{i}", (i, 9, 9), "a b c" + " d" * (i == 4), None) for i in range(5)]
    folder = write_split(tmp_path / "s", samples)
    settings = replace(SETTINGS, progress=lambda *step: seen.append(step))
    metrics = evaluate_folder(reader, folder, settings).metrics
    assert metrics["truncated_captions"] == 1 / 5
    assert "s: 1 of 5 captions (20.0 %) are longer than the text tower reads" in log.text
    assert seen == [("s", 0, 2), ("s", 1, 2)]


def test_without_classes_only_retrieval(encoder, tmp_path, write_split):
    samples = [(f"{i}", (i, 9, 9), f"caption {i}", None) for i in range(8)]
    found = evaluate_folder(encoder, write_split(tmp_path / "s", samples))
    metrics = found.metrics
    assert found.outcomes is None
    assert "acc1" not in metrics
    assert metrics["num_samples"] == 8
    assert metrics["main_metric"] == metrics["mean_recall@1"]


@pytest.mark.parametrize("loss", [None, nn.Linear(1, 1), LossWithout()])
def test_a_loss_without_log_normalizers_leaves_the_keys_out(encoder, small_split, loss):
    metrics = evaluate_folder(encoder, small_split, loss=loss).metrics
    assert not {key for key in metrics if "normalizer" in key}
    assert "acc1" in metrics


def test_an_error_of_the_loss_is_raised(encoder, small_split):
    with pytest.raises(UserError, match="expected 32"):
        evaluate_folder(encoder, small_split, loss=BrokenLoss())


def test_a_class_beyond_the_names(encoder, tmp_path, write_split):
    samples = [("a", (1, 1, 1), "one", 0), ("b", (2, 2, 2), "two", 5)]
    folder = write_split(tmp_path / "s", samples, ["x", "y"], ["{c}"])
    with pytest.raises(UserError, match=r"'b' has class 5.*2 class names"):
        evaluate_folder(encoder, folder)


def test_an_image_that_does_not_decode(encoder, tmp_path, write_split):
    samples = [(f"{i}", (i, 1, 1), f"caption {i}", None) for i in range(5)]
    samples.insert(3, ("broken", b"no picture", "caption", None))
    folder = write_split(tmp_path / "s", samples)
    with pytest.raises(UserError, match=r"00000\.tar, sample broken"):
        evaluate_folder(encoder, folder)
    allowed = EvaluationSettings(batch_size=2, workers=0, allow_damage=True)
    evaluated = evaluate_folder(encoder, folder, allowed)
    assert evaluated.metrics["num_samples"] == 5
    # Positions after the broken sample still name their own images.
    for query in evaluated.gallery.queries:
        for found in [query.answer, *(result.picture for result in query.results)]:
            data = io.BytesIO(base64.b64decode(found.png))
            assert Image.open(data).getpixel((0, 0)) == (int(found.key), 1, 1)


def test_a_shard_that_is_cut_off(encoder, small_split):
    shard = small_split / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"must be complete.*00000\.tar"):
        evaluate_folder(encoder, small_split)


def test_the_gallery_marks_hits(encoder, small_split):
    gallery = evaluate_folder(encoder, small_split).gallery
    assert gallery.split == "letters"
    assert len(gallery.queries) == 7
    for query in gallery.queries:
        assert len(query.results) == 5
        scores = [result.score for result in query.results]
        assert scores == sorted(scores, reverse=True)
        # The images are one color each: a hit shows the very pixels of the query's own.
        for result in query.results:
            assert result.hit == (result.picture.png == query.answer.png)
    assert any(result.hit for query in gallery.queries for result in query.results)
    assert evaluate_folder(encoder, small_split).gallery == gallery
