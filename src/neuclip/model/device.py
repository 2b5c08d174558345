"""The device and the arithmetic of the towers."""

import os
from typing import Literal

import torch

from neuclip.errors import UserError

Precision = Literal["fp32", "amp_bf16", "bf16"]


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device to compute on.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of torch has no CUDA; use cpu")
    if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # --gpus-per-task: each process sees its own alone
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are "
            "visible; start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """`auto` is amp_bf16 on a GPU that has bfloat16, and fp32 elsewhere."""
    if wanted != "auto":
        return wanted
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "amp_bf16" if bf16 else "fp32"
