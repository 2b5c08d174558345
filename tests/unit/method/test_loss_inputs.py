"""What a loss says of wrong inputs: each message names shapes and values."""

import pytest
import torch
from torch.nn import functional

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError

SCALE = torch.tensor(10.0)


def unit(count: int, dim: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


@pytest.fixture(params=list(METHODS))
def loss(request):
    settings = {}
    if "gamma_schedule" in METHODS[request.param].settings.model_fields:
        settings = {"gamma": 0.5, "gamma_decay_epochs": 2.0}
    return create_loss(request.param, embed_dim=4, steps_per_epoch=3, num_samples=10, **settings)


def call(loss, image, text, ids=None, bias=True):
    ids = torch.arange(len(image)) if ids is None else ids
    bias = torch.tensor(-10.0) if bias else None
    return loss(image, text, SCALE, bias, sample_ids=ids, **keys(loss, image, text))


def keys(loss, image, text):
    return keys_for(loss, torch.stack([image, text])) if image.shape == text.shape else {}


def test_unequal_batches(loss):
    with pytest.raises(UserError, match=r"image_features \[3, 4\], text_features \[5, 4\]"):
        call(loss, unit(3), unit(5))


def test_wrong_rank(loss):
    with pytest.raises(UserError, match=r"\[2, 3, 4\].*same shape \[batch, 4\]"):
        call(loss, torch.stack([unit(3)] * 2), torch.stack([unit(3)] * 2))


def test_embed_dim_mismatch(loss):
    with pytest.raises(UserError, match=r"\[3, 5\].*embed_dim=4"):
        call(loss, unit(3, 5), unit(3, 5))


def test_a_single_pair(loss):
    with pytest.raises(UserError, match="one pair has no negatives"):
        call(loss, unit(1), unit(1))


def test_a_norm_other_than_one_is_reported(loss):
    image = unit(3)
    image[1] *= 1.5
    with pytest.raises(UserError, match=r"image_features: row 1 has norm 1\.5;.*normalize"):
        call(loss, image, unit(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_row_that_is_not_finite_is_reported(loss, bad):
    text = unit(4)
    text[2, 1] = bad
    with pytest.raises(UserError, match=r"text_features: 1 of 4 rows are not finite.*row 2"):
        call(loss, unit(4), text)


def test_bfloat16_embeddings_count_as_unit_norm(loss):
    image, text = unit(6).bfloat16(), unit(7)[:6].bfloat16()
    assert torch.isfinite(call(loss, image, text))


def test_missing_sample_ids_are_reported(loss):
    if loss.needs_sample_ids:
        with pytest.raises(UserError, match=r"pass sample_ids, a tensor of 3 integers"):
            loss(unit(3), unit(3), SCALE)
    else:
        loss(unit(3), unit(3), SCALE, torch.tensor(-10.0), **keys(loss, unit(3), unit(3)))


def test_wrong_sample_ids(loss):
    with pytest.raises(UserError, match=r"sample_ids \[2\] of torch.int64: expected \[3\]"):
        call(loss, unit(3), unit(3), torch.arange(2))
    with pytest.raises(UserError, match=r"sample_ids \[3\] of torch.float32: .*int64"):
        call(loss, unit(3), unit(3), torch.zeros(3))


@pytest.mark.parametrize(("wrong", "position"), [(10, 1), (-1, 2)])
def test_ids_out_of_range_are_reported_with_position_and_bound(loss, wrong, position):
    ids = torch.tensor([4, 5, 6])
    ids[position] = wrong
    if not loss.needs_sample_ids:
        call(loss, unit(3), unit(3), ids)
        return
    with pytest.raises(
        UserError,
        match=rf"1 of 3 .*first is {wrong} at position {position}; .*num_samples=10.*0 to 9",
    ):
        call(loss, unit(3), unit(3), ids)


def test_the_sigmoid_loss_needs_its_bias():
    loss = create_loss("siglip", embed_dim=4)
    assert loss.initial_logit_bias == -10.0
    with pytest.raises(UserError, match=r"needs a learnable logit_bias.*-10"):
        call(loss, unit(3), unit(3), bias=False)
    assert not loss.predicts_log_normalizers
    with pytest.raises(UserError, match="no log-normalizers"):
        loss.predict_log_normalizers(unit(3), unit(3), SCALE)


def test_output_dict_and_metrics(loss):
    image, text = unit(4), unit(5)[:4]
    given = {"sample_ids": torch.arange(4), **keys(loss, image, text)}
    result = loss(image, text, SCALE, torch.tensor(-10.0), **given, output_dict=True)
    assert list(result) == ["contrastive_loss"]
    assert all(isinstance(value, float) for value in loss.metrics().values())
    assert loss.metrics()


# --- keys


def test_keys_are_needed_by_the_loss_that_contrasts_with_them_alone():
    with pytest.raises(UserError, match=r"pass key_features, \[2, 3, 4\].* with decay 0.995"):
        create_loss("moco", embed_dim=4)(unit(3), unit(3), SCALE)
    with pytest.raises(UserError, match="contrasts with no key_features: leave them out"):
        create_loss("openclip", embed_dim=4)(unit(3), unit(3), SCALE, key_features=unit(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys[0], r"key_features \[3, 4\]: expected \[2, 3, 4\]"),
        (lambda keys: 2 * keys, r"key_features\[0\] \(images\): row 0 has norm 2;"),
        (
            lambda keys: keys.index_fill(0, torch.tensor(1), torch.nan),
            r"key_features\[1\] \(texts\): 3 of 3 rows are not finite",
        ),
    ],
)
def test_wrong_keys(change, message):
    loss = create_loss("moco", embed_dim=4)
    keys = keys_for(loss, unit(6).view(2, 3, 4))["key_features"]
    with pytest.raises(UserError, match=message):
        loss(unit(3), unit(3), SCALE, key_features=change(keys))
