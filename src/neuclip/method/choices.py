"""The named choices inside the methods, for the settings and for the code that acts on them.

Imports no torch, so that the catalogue can use it.
"""

from dataclasses import dataclass
from typing import Literal

GammaSchedule = Literal["cosine", "constant", "final"]
"""How gamma goes from 1 to its final value: see `neuclip.method.schedule`."""

TemperatureGradient = Literal["exact", "fastclip"]
"""The gradient by the temperature: see `neuclip.method.losses.global_contrastive`."""

ObjectiveScale = Literal["fastclip", "drrho"]
"""How the terms of a batch are averaged: see `neuclip.method.losses.global_contrastive`."""

TemperatureOptimizer = Literal["momentum", "adam", "fastclip"]
"""The optimiser of individual temperatures: see `neuclip.method.temperature`."""

Amortization = Literal["log_l2", "kl_div_asym", "js_div"]
"""AmorLIP's fitting objective: see `neuclip.method.normalizers.amortized`."""

PredictionGradient = Literal["detached", "full", "union"]
"""The gradient through predicted log-normalizers: a constant; differentiated inside the conjugate;
differentiated as the objective itself, in which prototypes are extra negatives."""

QueueAlignment = Literal["none", "mean", "moments"]
"""How a queue follows the batch: see `neuclip.method.normalizers.embedding_queue`."""

QueuePositives = Literal["pair", "anchor"]
"""What a positive pulls in a sum over a queue: both embeddings of its pair, or the anchor alone."""

Mixing = Literal["gamma", "none"]
"""What a predicted log-normalizer is mixed with: the batch estimate by gamma, or nothing."""

RestartSource = Literal["earlier", "current"]
"""Where prototypes restart from: batches before the one they are then trained on, or that one."""

RestartFill = Literal["pool", "batch"]
"""How more prototypes than a batch has are restarted: all of them from several batches, or as many
as one batch has, in turn."""

PrototypeOptimizer = Literal["adagrad_norm", "adagrad", "adam", "sgd"]
"""The optimiser of prototypes: see `neuclip.method.normalizers.inner_optimizer`."""

NetworkRefresh = Literal["restart", "rolling"]
"""How trained prototypes are renewed from recent embeddings: all at once, or a moving window."""

FusedLoss = Literal["auto", "on", "off"]
"""Whether the softmaxes of a batch use fused kernels: see `neuclip.method.arithmetic`."""

CompiledLoss = Literal["off", "compile", "graphs"]
"""What torch.compile does of a loss: see `neuclip.method.arithmetic`."""

BatchOption = Literal["groups", "pair_weights", "negative_features"]
"""What a batch may bring to its loss beside the pairs: arguments of the call, by name."""

BATCH_OPTIONS: frozenset[BatchOption] = frozenset({"groups", "pair_weights", "negative_features"})
"""All of them: what the methods of the package take."""


@dataclass(frozen=True)
class AdamRates:
    """The numbers of Adam besides its learning rate; the defaults are torch's.

    Attributes:
        beta1: share of the first moment that a step keeps.
        beta2: share of the second moment that a step keeps.
        eps: added to the root of the second moment.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
