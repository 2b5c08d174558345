"""LoRA and distillation: what contradicts, and what would be ignored."""

import pytest

from neuclip.config.validation import validate
from neuclip.errors import UserError

LORA = {"lora_rank": 8}
WRONG = {
    "a lock": ({"adaptation": LORA, "model": {"lock_text": True}}, "--lora-towers image"),
    "sharding": ({"adaptation": LORA, "parallel": {"fsdp": True}}, "leave out --fsdp"),
    "a tower's weights": (
        {"adaptation": LORA, "model": {"pretrained_text_path": "x.pt"}},
        "--pretrained-text-path: checkpoints of LoRA",
    ),
    "alpha alone": ({"adaptation": {"lora_alpha": 4}}, "--lora-alpha has no effect without"),
    "towers alone": ({"adaptation": {"lora_towers": "text"}}, "--lora-towers has no effect"),
    "half a teacher": ({"adaptation": {"distill_model": "ViT-B-32"}}, "give both"),
    "two teachers": (
        {"adaptation": {"distill_start": 1, "distill_model": "a", "distill_pretrained": "b"}},
        "both name a teacher",
    ),
    "a wrong target": ({"adaptation": {"lora_targets": "q,w"}}, "some of q, k, v, out, mlp"),
    "no target": ({"adaptation": {"lora_targets": ""}}, "some of q, k, v, out, mlp"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_contradict_are_refused(case):
    tree, words = WRONG[case]
    with pytest.raises(UserError, match=words):
        validate(tree, "here").check()


def test_targets_have_one_order():
    config = validate({"adaptation": {"lora_rank": 4, "lora_targets": "mlp,v,q"}}, "here")
    config.check()
    assert config.adaptation.lora_targets == "q,v,mlp"
