import pytest
import torch

from neuclip.data.batch import Batch
from neuclip.data.samples import Damage
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split
from neuclip.evaluation.interfaces import first_of_each


def batches(encoder, images, captions, size=3, damage=()):
    for start in range(0, len(captions), size):
        part = slice(start, start + size)
        positions = torch.arange(len(captions))[part]
        yield Batch(
            images=images[part],
            tokens=encoder.tokenize(captions[part]),
            sample_ids=positions,
            class_indices=positions % 2,
            captions=captions[part],
            keys=[f"k{i}" for i in positions.tolist()],
            damage=damage,
        )


@pytest.fixture
def images():
    return torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))


CAPTIONS = ["a", "b", "a", "c", "d", "e", "b"]


def test_both_towers_run_once_over_everything(encoder, images):
    encoded = encode_split(encoder, batches(encoder, images, CAPTIONS))
    assert (encoder.images_seen, encoder.texts_seen) == (7, 7)
    torch.testing.assert_close(encoded.image_features, encoder.encode_image(images))
    assert encoded.keys == [f"k{i}" for i in range(7)]
    assert encoded.captions == CAPTIONS
    assert encoded.class_indices.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert encoded.sample_ids.tolist() == list(range(7))
    assert len(encoded) == 7


def test_identical_images_and_captions_share_a_number(encoder, images):
    images[4] = images[1]
    images[6] = images[2]
    images[6, 0, 0, 0] += 1e-6  # one pixel, hardly
    encoded = encode_split(encoder, batches(encoder, images, CAPTIONS))
    assert encoded.image_groups.tolist() == [0, 1, 2, 3, 1, 4, 5]
    assert encoded.text_groups.tolist() == [0, 1, 0, 2, 3, 4, 1]
    assert first_of_each(encoded.image_groups).tolist() == [0, 1, 2, 3, 5, 6]


def test_damage_is_refused_with_shard_and_key(encoder, images):
    damage = (Damage("faces/00003.tar", "00017", "image", "cannot identify image file"),)
    with pytest.raises(UserError, match=r"faces/00003\.tar.*00017.*cannot identify"):
        encode_split(encoder, batches(encoder, images, CAPTIONS, damage=damage))
    damaged = batches(encoder, images, CAPTIONS, damage=damage)
    assert len(encode_split(encoder, damaged, allow_damage=True)) == 7


def test_an_empty_split_is_an_error(encoder):
    with pytest.raises(UserError, match="no sample could be read"):
        encode_split(encoder, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_not_a_perfect_score(encoder, images, bad):
    images[5, 0, 0, 0] = bad
    with pytest.raises(UserError, match=r"image tower.*1 of 7.*'k5'"):
        encode_split(encoder, batches(encoder, images, CAPTIONS))
