"""Small towers with all that makes accumulation hard, and the components of a training step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import PatchDropout
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.model.architecture import Architecture
from neuclip.model.clip import Clip
from neuclip.training.optim import Optimizer
from small_memory import small_memory

DIM, SAMPLES = 6, 40
CPU = torch.device("cpu")
NETWORK = {
    "num_prototypes": 7,
    "inner_steps": 10,
    "refresh": "restart",
    "restart_steps": 2,
    "gradient": "detached",
}


class Towers(nn.Module):
    """open_clip's interface; `noisy`: BatchNorm, patch dropout, dropout and stochastic depth."""

    def __init__(self, *, noisy: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8) if noisy else nn.Identity()
        self.drop_patches = PatchDropout(0.5, exclude_first_token=False)
        self.noise = nn.Sequential(nn.Dropout(0.2), DropPath(0.3))
        self.head = nn.Linear(8, DIM)
        self.words = nn.Embedding(50, 8)
        self.text_head = nn.Linear(8, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if bias else None
        if not noisy:
            self.drop_patches.prob = 0.0
            self.noise = nn.Identity()

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        patches = self.norm(self.patches(images.to(self.head.weight.dtype))).flatten(2).mT
        image = self.head(
            (patches + self.noise(self.drop_patches(patches).tanh().mean(1, True))).mean(1)
        )
        words = self.words(tokens)
        text = self.text_head((words + self.noise(words.tanh())).mean(1))
        outputs = {
            "image_features": functional.normalize(image, dim=-1),
            "text_features": functional.normalize(text, dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        return outputs | ({} if self.logit_bias is None else {"logit_bias": self.logit_bias})


class KeepingOptimizer(Optimizer):
    """Keeps the gradients of every step, and takes a plain gradient step."""

    def __init__(self, towers: nn.Module, settings: OptimConfig) -> None:
        super().__init__(towers, settings, 10)
        self.kept: list[dict[str, Tensor]] = []
        self._named = {name: p for name, p in towers.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        assert skip == 0
        grads = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        self.kept.append({name: grad.clone() for name, grad in grads.items()})
        for name, grad in grads.items():
            self._named[name] -= 0.05 * grad
        self.inner.zero_grad()


@dataclass(frozen=True)
class Bench:
    """The components of a step, in float64."""

    clip: Clip
    towers: nn.Module
    loss: nn.Module
    optimizer: KeepingOptimizer

    @classmethod
    def of(cls, method: str, more: Mapping[str, Any] | None = None, **towers: bool) -> "Bench":
        """The components for a method; `more`: settings of it."""
        torch.manual_seed(0)
        model = Towers(bias=method == "siglip", **towers).double()
        fields = METHODS[method].settings.model_fields
        settings = {"gamma": 0.5} if "gamma_schedule" in fields else {}
        settings |= {"gamma_decay_epochs": 2.0} if "gamma_decay_epochs" in fields else {}
        settings |= NETWORK if method == "neuclip" else {}
        settings |= small_memory(method, NETWORK["num_prototypes"])
        settings |= more or {}
        loss = create_loss(
            method, embed_dim=DIM, steps_per_epoch=2, num_samples=SAMPLES, **settings
        ).double()
        if not loss.learns_temperature:
            model.logit_scale.requires_grad_(False)
        optimizer = KeepingOptimizer(model, resolve(RunConfig(), 1).optim)
        clip = Clip(
            Architecture("stub", {}, {}),
            model,
            torch.tensor,
            torch.tensor,
            torch.tensor,
            DIM,
            "fp32",
        )
        return cls(clip, model, loss, optimizer)


def batch(number: int, size: int = 12, *, options: bool = False) -> Batch:
    """A different batch for every number, without corrupt samples.

    With `options` it has groups, weights of pairs, and hard negatives, of the tokens 40 to 49.
    """
    generator = torch.Generator().manual_seed(number)
    ids = torch.randperm(SAMPLES, generator=generator)[:size]
    return Batch(
        images=torch.randn(size, 3, 8, 8, generator=generator),
        tokens=torch.randint(40 if options else 50, (size, 4), generator=generator),
        sample_ids=ids,
        class_indices=torch.zeros(size, dtype=torch.int64),
        captions=[""] * size,
        keys=[str(i) for i in ids.tolist()],
        groups=torch.stack([ids % 5, ids % 3], 1) if options else None,
        pair_weights=torch.rand(size, generator=generator) if options else None,
        negative_tokens=40 + torch.randint(10, (size, 4), generator=generator) if options else None,
        has_negative=ids % 4 > 0 if options else None,
    )


def rows(whole: Batch, start: int, stop: int) -> Batch:
    """A part of a batch."""
    names = ("images", "tokens", "sample_ids", "class_indices", "captions", "keys")
    names += ("groups", "pair_weights", "negative_tokens", "has_negative")
    values = {name: getattr(whole, name) for name in names}
    return Batch(
        **{name: None if value is None else value[start:stop] for name, value in values.items()}
    )


def split(whole: Batch, size: int) -> list[Batch]:
    """Micro-batches."""
    return [rows(whole, start, start + size) for start in range(0, len(whole), size)]
