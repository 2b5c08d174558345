"""The validation loss against a double loop, and against open_clip's own loss."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss

from neuclip.evaluation.validation_loss import validation_loss


def naive(images, texts, scale):
    total = 0.0
    for queries, candidates in ((images, texts), (texts, images)):
        for i, query in enumerate(queries):
            logits = [scale * float(query @ candidate) for candidate in candidates]
            total += math.log(sum(math.exp(x - logits[i]) for x in logits))
    return total / (2 * len(images))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_it_is_infonce_over_the_split(make_split, scale):
    split = make_split(list(range(7)), [f"caption {i}" for i in range(7)])
    images, texts = split.image_features, split.text_features
    found = validation_loss(split, scale)
    assert found == pytest.approx(naive(images.double(), texts.double(), scale), rel=1e-9)
    theirs = ClipLoss()(images.double(), texts.double(), torch.tensor(scale).double())
    assert found == pytest.approx(float(theirs), rel=1e-6)


def test_equal_images_and_equal_captions_are_not_negatives(make_split):
    split = make_split([0, 1, 0, 2, 3], ["a", "b", "c", "b", "d"])
    rows = [0, 1, 4]  # row 2 repeats image 0, row 3 the caption of row 1
    expected = naive(split.image_features[rows], split.text_features[rows], 5.0)
    assert validation_loss(split, 5.0) == pytest.approx(expected, rel=1e-5)


def test_guessing_gives_the_logarithm_of_the_number_of_pairs(make_split):
    split = make_split(list(range(6)), list("abcdef"), constant=True)
    assert validation_loss(split, 20.0) == pytest.approx(math.log(6))


def test_a_single_pair_has_no_loss(make_split):
    assert validation_loss(make_split([0, 0], ["a", "a"]), 1.0) is None
