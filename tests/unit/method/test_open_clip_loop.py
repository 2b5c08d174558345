"""Every loss inside open_clip's own `train_one_epoch`."""

import logging
from types import SimpleNamespace

import pytest
import torch
from open_clip import ClipLoss
from open_clip.model import CLIP
from open_clip_train.train import train_one_epoch

from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError

BATCH, BATCHES, DIM = 6, 4, 16
ARGS = SimpleNamespace(
    device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True,
    grad_clip_norm=None, horovod=False, rank=0, local_rank=0, log_local=False, world_size=1,
    log_every_n_steps=1, batch_size=BATCH, wandb=False,
)  # fmt: skip


class Batches:
    """What the loop uses of a loader."""

    num_batches, num_samples = BATCHES, BATCH * BATCHES

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(BATCHES):
            images = torch.randn(BATCH, 3, 16, 16, generator=generator)
            texts = torch.randint(1, 63, (BATCH, 8), generator=generator)
            texts[:, -1] = 63  # the end token
            yield images, texts


def model_after(loss) -> CLIP:
    """A model that open_clip's loop has trained with a loss for one epoch."""
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=DIM,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "layers": 1, "heads": 1},
        init_logit_bias=-5.0,
        output_dict=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Batches())}
    train_one_epoch(model, data, loss, 0, optimizer, None, None, None, ARGS)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_trains_in_the_loop_of_open_clip(name, caplog):
    loss = create_loss(name, embed_dim=DIM)
    if METHODS[name].needs_sample_ids:  # that loop knows no ids
        with pytest.raises(UserError, match="keeps a state per sample: pass sample_ids"):
            model_after(loss)
        return
    if loss.key_momentum is not None:  # nor keys
        with pytest.raises(UserError, match=r"pass key_features, \[2, 6, 16\]"):
            model_after(loss)
        return
    with caplog.at_level(logging.INFO):
        trained = model_after(loss)
    assert sum("Contrastive_loss" in message for message in caplog.messages) == BATCHES
    untrained = model_after(lambda logit_scale, output_dict, **_: {"none": 0 * logit_scale})
    for part in ("visual.conv1.weight", "token_embedding.weight"):
        assert not torch.equal(trained.state_dict()[part], untrained.state_dict()[part]), part


def test_openclip_is_the_loss_of_open_clip_there():
    ours = model_after(create_loss("openclip", embed_dim=DIM))
    theirs = model_after(lambda logit_bias, **outputs: ClipLoss()(**outputs))
    for (name, one), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
