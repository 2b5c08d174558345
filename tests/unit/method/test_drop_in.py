"""Losses from the width of the embeddings alone: in anybody's loop, with no other number."""

import logging
import pickle
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.catalogue.method_settings import gamma_floor
from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError
from neuclip.method.sample_table import MAX_GROWN

ROOT = Path(__file__).parents[3]
BATCH, DIM, STEPS = 6, 8, 5
TABLES = [info.name for info in METHODS.values() if info.needs_sample_ids]
GAMMA = ["neuclip", "fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3"]


def in_full(name: str) -> dict[str, object]:
    """The numbers that a loss without them takes."""
    known: dict[str, object] = {"steps_per_epoch": 1000, "global_batch_size": BATCH}
    if name in TABLES:
        known["num_samples"] = 1000
    if name in GAMMA:
        known |= {"gamma": gamma_floor(24), "gamma_decay_epochs": 24.0}
    if name == "neuclip_pool":
        known |= {"gamma_decay_epochs": 2.0, "pool_size": 128 * BATCH, "gradient_size": 32 * BATCH}
    if name == "infonce_queue":
        known |= {"queue_size": 128 * BATCH, "queue_warm_up": 1000}
    if name == "rgcl_queue":
        known |= {"queue_size": 4 * BATCH}
    if name == "moco":
        known |= {"queue_size": 128 * BATCH}
    return known


def features(seed: int, batch: int = BATCH, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(2, batch, dim, generator=generator), dim=-1)


def ids_of(seed: int, batch: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(40 * (seed % 5 + 1), generator=generator)[:batch]


def run(loss, first: int = 0, last: int = STEPS, batch: int = BATCH) -> list[torch.Tensor]:
    """Loss and gradient of each step."""
    found = []
    for step in range(first, last):
        leaf = features(step, batch).requires_grad_()
        value = loss(*leaf, 10.0, -5.0, sample_ids=ids_of(step, batch), **keys_for(loss, leaf))
        value.backward()
        found += [value.detach(), leaf.grad]
    return found


def same(some, others) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_one_argument_gives_the_loss_of_all_numbers(name):
    alone, full = (
        create_loss(name, embed_dim=DIM),
        create_loss(name, embed_dim=DIM, **in_full(name)),
    )
    same(run(alone), run(full))
    assert alone.metrics() == full.metrics()


@pytest.mark.parametrize("name", METHODS)
def test_states_before_and_after_the_first_call(name):
    whole = create_loss(name, embed_dim=DIM)
    fresh = deepcopy(whole.state_dict())
    expected = run(whole)
    again = create_loss(name, embed_dim=DIM)
    again.load_state_dict(fresh)
    same(run(again, last=2), expected[:4])
    later = create_loss(name, embed_dim=DIM)
    later.load_state_dict(again.state_dict())
    same(run(later, first=2), expected[4:])
    later.load_state_dict(fresh)  # back to the start, in a loss that has seen batches
    same(run(later), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_reaches_another_process(name):
    """As `torch.multiprocessing.spawn` and `torch.save` of the whole module send it."""
    loss = create_loss(name, embed_dim=DIM)
    same(run(pickle.loads(pickle.dumps(loss))), run(loss))


def test_the_first_batch_settles_the_pool():
    loss = create_loss("neuclip_pool", embed_dim=DIM)
    run(loss, last=1)
    run(loss, batch=3)  # an incomplete batch at the end of an epoch
    settings = loss.normalizer.settings
    assert (settings.size, settings.gradient_size) == (128 * BATCH, 32 * BATCH)
    resumed = create_loss("neuclip_pool", embed_dim=DIM)
    resumed.load_state_dict(loss.state_dict())
    run(resumed, last=1, batch=3)
    assert resumed.normalizer.settings == settings
    assert resumed.normalizer.fill_steps == loss.normalizer.fill_steps == 128


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_loss_changes_its_type_before_the_first_call(kind):
    loss = create_loss("neuclip_pool", embed_dim=DIM).to(kind)
    run(loss, last=2)
    assert loss.normalizer.ring.slots.dtype == kind


def sizes(loss) -> set[int]:
    return {value.shape[1] for key, value in loss.state_dict().items() if "table.values" in key}


@pytest.mark.parametrize("name", TABLES)
def test_tables_grow_with_the_ids(name):
    loss = create_loss(name, embed_dim=DIM)
    for step, size in ((0, 32), (4, 256)):
        run(loss, step, step + 1)
        assert size / 2 <= int(ids_of(step).max()) < size
        assert sizes(loss) == {size}
    unseen = loss.predict_log_normalizers(*features(1), 10.0, torch.arange(10**6, 10**6 + BATCH))
    known = create_loss(name, embed_dim=DIM, num_samples=2 * 10**6)
    torch.testing.assert_close(
        unseen,
        known.predict_log_normalizers(*features(1), 10.0, torch.arange(10**6, 10**6 + BATCH)),
    )
    with pytest.raises(UserError, match=r"has a table \[\d, 256\].* this loss has \[\d, 1000\]"):
        create_loss(name, embed_dim=DIM, num_samples=1000).load_state_dict(loss.state_dict())


@pytest.mark.parametrize("name", TABLES)
def test_ids_that_are_no_numbers_of_samples(name):
    loss = create_loss(name, embed_dim=DIM)
    with pytest.raises(UserError, match="pass sample_ids, a tensor of 6 integers, such as the pai"):
        loss(*features(0), 10.0)
    hashes = ids_of(0) + MAX_GROWN
    with pytest.raises(UserError, match=r"the largest is .*num_samples=.*number the pairs 0, 1, 2"):
        loss(*features(0), 10.0, sample_ids=hashes)
    with pytest.raises(UserError, match="6 of 6 are negative, the first is -"):
        loss(*features(0), 10.0, sample_ids=-1 - ids_of(0))
    assert sizes(loss) == {0}


def test_the_pool_says_once_what_it_loses_without_ids(caplog):
    loss = create_loss("neuclip_pool", embed_dim=DIM)
    with caplog.at_level(logging.WARNING, "neuclip"):
        for step in range(3):
            loss(*features(step), 10.0)
    (message,) = caplog.messages
    assert "own pair from earlier steps counts as a negative" in message
    assert "newest 768 pairs; pass sample_ids=" in message


def test_logit_scale_is_one_number():
    loss = create_loss("openclip", embed_dim=DIM)
    scale = torch.tensor([10.0], requires_grad=True)  # as some models keep it
    value = loss(*features(0), scale)
    value.backward()
    assert value.shape == ()
    assert value.item() == loss(*features(0), 10.0).item()
    assert scale.grad.shape == (1,)
    with pytest.raises(UserError, match=r"logit_scale \[2\]: must be one number"):
        loss(*features(0), torch.ones(2))


# --- the examples of the pages, as they stand ---------------------------------------------------


def code_of(page: str, heading: str) -> str:
    """The first Python block below a heading (or words) of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL)
    assert found
    return found[1]


def environment() -> dict[str, object]:
    """What an example finds in the loop around it."""
    image, text = features(3, dim=512).requires_grad_()
    return {
        "device": "cpu",
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.tensor(10.0),
        "logit_bias": torch.tensor(-5.0),
        "sample_ids": ids_of(3),
    }


def expected(name: str) -> float:
    loss = create_loss(name, embed_dim=512, **in_full(name))
    return loss(*features(3, dim=512), 10.0, -5.0, sample_ids=ids_of(3)).item()


def test_the_example_of_the_readme():
    names = environment()
    exec("import neuclip\n" + code_of("README.md", "In your own training loop"), names)
    assert names["loss"].item() == expected("neuclip_pool")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "moco"])
def test_the_example_of_the_guide_for_every_method(name):
    names, code = environment(), code_of("docs/own_loop.md", "## Create the loss")
    assert code.count('"neuclip_pool"') == 1
    exec(code.replace('"neuclip_pool"', repr(name)), names)
    assert names["loss"].item() == expected(name)


class Model(torch.nn.Module):
    """Towers of one matrix each."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(8, 512), torch.nn.Linear(8, 512)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, images, texts):
        return {
            "image_features": normalize(self.image(images), dim=-1),
            "text_features": normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def test_the_example_of_the_guide_for_momentum_contrast():
    torch.manual_seed(0)
    model = Model()
    before = deepcopy(model)
    batches = [(*torch.randn(2, 6, 8), ids_of(step)) for step in range(3)]
    names = {
        "device": "cpu",
        "model": model,
        "batches": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
    }
    code = code_of("docs/own_loop.md", "## Pass the keys of `moco`")
    exec("import math\nimport torch\nimport neuclip\n" + code, names)
    assert names["loss_fn"].metrics()["queue_filled"] == 12
    after = names["momentum_model"].module.image.weight
    moved = (after - before.image.weight).norm() / (model.image.weight - before.image.weight).norm()
    assert 0 < moved < 0.02  # two steps of 0.5 %
