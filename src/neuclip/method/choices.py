"""The named choices inside the methods, for the settings and for the code that acts on them.

Imports nothing but `typing`, so that the catalogue can use it without loading torch.
"""

from typing import Literal

GammaSchedule = Literal["cosine", "constant"]
"""How gamma goes from 1 to its final value: see `neuclip.method.schedule`."""

TemperatureGradient = Literal["exact", "fastclip"]
"""The gradient by the temperature: see `neuclip.method.losses.global_contrastive`."""

TemperatureOptimizer = Literal["momentum", "adam", "fastclip"]
"""The optimiser of individual temperatures: see `neuclip.method.temperature`."""

Amortization = Literal["log_l2", "kl_div_asym", "js_div"]
"""AmorLIP's fitting objective: see `neuclip.method.normalizers.amortized`."""

PredictionGradient = Literal["detached", "full", "union"]
"""The gradient through predicted log-normalizers: a constant; differentiated inside the conjugate;
differentiated as the objective itself, in which prototypes are extra negatives."""

PrototypeOptimizer = Literal["adagrad_norm", "adagrad", "adam", "sgd"]
"""The optimiser of prototypes: see `neuclip.method.normalizers.inner_optimizer`."""

NetworkRefresh = Literal["restart", "rolling"]
"""How trained prototypes are renewed from recent embeddings: all at once, or a moving window."""
