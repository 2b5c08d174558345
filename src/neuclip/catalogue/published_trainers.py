"""What published trainers assume for flags that a command line leaves out. Imports no torch.

A line that selects its method by a trainer's switches gets that trainer's defaults; `--method` and
recipes get this project's. The values are those of each trainer's argument parser.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedTrainer:
    """The defaults of a published trainer that differ from this project's.

    Attributes:
        name: of the trainer, for messages.
        method: its defaults for a method's settings; a method takes those that it has.
        run: its defaults for other settings, by section and key.
        const_warms_up: whether `--lr-scheduler const` has a warm-up.
        tau_schedule: schedule of `lr_tau` where the line gives the rate and no schedule.
    """

    name: str
    method: Mapping[str, object] = field(default_factory=dict[str, object])
    run: Mapping[tuple[str, str], object] = field(default_factory=dict[tuple[str, str], object])
    const_warms_up: bool = True
    tau_schedule: str = "cosine"


_RUN: Mapping[tuple[str, str], object] = {
    ("model", "name"): "RN50",
    ("output", "log_every_n_steps"): 100,
}

FASTCLIP = PublishedTrainer(
    "FastCLIP",
    method={
        "rho": 8.0,
        "gamma": 0.8,
        "gamma_schedule": "cosine",
        "gamma_decay_epochs": 10.0,
        "epsilon": 1e-14,
        "temperature": 0.07,
    },
    run=_RUN,
    const_warms_up=False,
)
"""github.com/Optimization-AI/fast_clip, src/training/params.py and main.py."""

SCENT = PublishedTrainer(
    "SCENT",
    method={"rho": 8.0, "rate_offset": 0.8, "epsilon": 1e-14, "temperature": 0.07},
    run=_RUN,
    const_warms_up=False,
)
"""github.com/Optimization-AI/DRRho-CLIP with the patch of Optimization-AI/SCENT."""

AMORLIP = PublishedTrainer(
    "AmorLIP",
    method={
        "positive_weight": 1.0,
        "lambda_lr": 1e-3,
        "hidden_factor": 1.0,
        "amortization": "log_l2",
        "divergence_weight": 0.1,
        "fit_previous": False,
        "previous_weight": 0.8,
        "previous_epochs": 15.0,
        "ema_rate": 0.9997,
        "ema_steps": 1,
        "restart_epochs": 0,
        "temperature": 0.07,
    },
    run=_RUN,
    tau_schedule="step_thresh",
)
"""github.com/haotiansun14/AmorLIP, src/open_clip_train/params.py and main.py."""
