"""Chooses the device and the precision of the towers."""

import os
from typing import Literal

import torch

from neuclip.errors import UserError

Precision = Literal["fp32", "amp_bf16", "bf16"]


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Chooses the device to compute on.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        local_rank: index of this process on this machine, and of its GPU.

    Raises:
        UserError: CUDA was asked for and is not available, or this process has no GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine or this build of torch has no CUDA; use --device cpu"
        )
    if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # --gpus-per-task: each process sees only its own
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start "
            "at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Resolves `auto`: amp_bf16 on a GPU with bfloat16, fp32 elsewhere."""
    if wanted != "auto":
        return wanted
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "amp_bf16" if bf16 else "fp32"
