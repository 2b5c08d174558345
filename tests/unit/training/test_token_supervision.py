"""The token head beside the loss of a step: exact in micro-batches, and resumed."""

import copy

import pytest
import torch
from torch import nn

from neuclip import create_loss
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from neuclip.training.token_supervision import TokenSupervision
from supervised_steps import WEIGHT, Parts, pairs_of, parts_of, split
from tiny_models import CPU, RESNET, tiny


def steps(parts: Parts, size: int, numbers=range(3)) -> list[torch.Tensor]:
    return [parts.step(split(pairs_of(number), size)).loss for number in numbers]


def test_the_losses_are_added_and_trained_together():
    parts = parts_of()
    clip, head = parts.clip, parts.supervision.head
    reference = copy.deepcopy(head)
    whole = pairs_of(0)
    patches: list[torch.Tensor] = []
    handle = clip.towers.visual.transformer.register_forward_hook(
        lambda module, inputs, output: patches.append(output[:, 1:].mean(1))
    )
    outputs = clip.towers(whole.images, whole.tokens)
    handle.remove()
    contrastive = create_loss("openclip", embed_dim=16).double()(**outputs)
    expected = contrastive + WEIGHT * reference.loss(patches[0], whole.tokens)
    expected.backward()
    wanted = {f"towers.{name}": p.grad.clone() for name, p in clip.towers.named_parameters()}
    wanted |= {f"head.{name}": p.grad for name, p in reference.named_parameters()}
    clip.towers.zero_grad()
    before = copy.deepcopy(head.state_dict())
    result = parts.step([whole])
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.token_loss * WEIGHT, (expected - contrastive).detach())
    assert parts.gradients.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(parts.gradients[name], grad, msg=name)
    assert not torch.equal(head.tokens.weight, before["tokens.weight"])


@pytest.mark.parametrize("size", [6, 5])
def test_micro_batches_change_nothing(size):
    whole, parts = parts_of(), parts_of()
    torch.testing.assert_close(steps(parts, size), steps(whole, 12), rtol=1e-10, atol=1e-12)
    for modules in ((whole.clip.towers, parts.clip.towers), (whole.head, parts.head)):
        one, other = (module.state_dict() for module in modules)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_weight_0_is_no_head():
    clip = tiny()
    assert TokenSupervision.of(validate({}, "here"), clip, CPU) is None
    state = torch.get_rng_state()
    config = validate({"supervision": {"token_weight": 0.5}}, "here")
    one, other = (TokenSupervision.of(config, clip, CPU) for _ in range(2))
    assert one.weight == 0.5
    assert torch.equal(one.head.tokens.weight, other.head.tokens.weight)  # as on every rank
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"parallel": {"fsdp": True}}, "--token-weight 1 with --fsdp"),
        ({"model": {"pretrained": "a.pt"}, "evaluation": {"val_data": "x"}}, "this line only eval"),
    ],
)
def test_settings_that_contradict_it(tree, message):
    with pytest.raises(UserError, match=message):
        validate({**tree, "supervision": {"token_weight": 1.0}}, "here").check()


def test_a_locked_image_tower_is_refused():
    clip = tiny(RESNET)
    clip.towers.visual.requires_grad_(False)
    config = validate({"supervision": {"token_weight": 1.0}}, "here")
    with pytest.raises(UserError, match="nothing of it is trained"):
        TokenSupervision.of(config, clip, CPU)


def test_the_head_has_groups_of_its_kinds():
    towers, head = tiny().towers, nn.Linear(3, 4)
    settings = resolve(RunConfig(), 1).optim
    plain, more = Optimizer(towers, settings, 10), Optimizer(towers, settings, 10, head=head)
    assert [g.weight_decay for g in plain.groups] == [g.weight_decay for g in more.groups]
    extra = [
        [p for p in group.parameters if p not in set(before.parameters)]
        for before, group in zip(plain.groups, more.groups, strict=True)
    ]
    assert extra == [[head.bias], [head.weight], []]


def test_a_resumed_head_goes_on_bit_by_bit():
    whole = parts_of()
    steps(whole, 12)
    again = parts_of()
    again.clip.towers.load_state_dict(copy.deepcopy(whole.clip.towers.state_dict()))
    again.head.load_state_dict(copy.deepcopy(whole.head.state_dict()))
    later = range(3, 6)
    for one, other in zip(steps(whole, 12, later), steps(again, 12, later), strict=True):
        assert torch.equal(one, other)
    for name, value in whole.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], value), name


def test_the_step_takes_supervision_with_any_other_part():
    """A loss with keys: their pass is not what the head reads."""
    parts = parts_of("moco")
    assert isinstance(parts.step, TrainingStep)
    assert all(torch.isfinite(loss) for loss in steps(parts, 5))
    assert parts.head.captions == 36
