"""Chooses the device and the precision of the towers."""

import os
import re
from typing import Literal

import torch

from neuclip.errors import UserError, quantity

Precision = Literal["fp32", "amp_bf16", "amp_fp16", "bf16"]


def choose_device(wanted: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Chooses the device to compute on.

    Args:
        wanted: `auto`, `cpu`, `cuda`, `cuda:` and the index of a GPU, or `mps`.
        local_rank: index of this process on this machine, and of its GPU.
        processes: number of processes of the run.

    Raises:
        UserError: the device does not exist here, or this process has no GPU of its own.
    """
    if wanted == "mps" or re.fullmatch(r"cuda:\d{1,3}", wanted):
        return _one_device(wanted, processes)
    if wanted not in {"auto", "cpu", "cuda"}:
        raise UserError(f"--device {wanted}: must be auto, cpu, cuda, cuda:1 or mps")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    _require_cuda(wanted)
    if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # --gpus-per-task: each process sees only its own
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start "
            "at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def _one_device(wanted: str, processes: int) -> torch.device:
    """A device that only one process can use; it becomes CUDA's current one."""
    if processes > 1:
        raise UserError(
            f"--device {wanted} is for one process, and this run has {processes}: --device cuda "
            "gives each process a GPU of its own"
        )
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(
                "--device mps: this machine or this build of torch has no Metal (Apple silicon, "
                "macOS 14 or newer); use --device cpu"
            )
        return torch.device("mps")
    _require_cuda(wanted)
    device, visible = torch.device(wanted), torch.cuda.device_count()
    if device.index >= visible:
        indices = "its index is 0" if visible == 1 else f"their indices are 0 to {visible - 1}"
        raise UserError(f"--device {wanted}: {quantity(visible, 'GPU')} visible here; {indices}")
    torch.cuda.set_device(device)
    return device


def _require_cuda(wanted: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {wanted}: this machine or this build of torch has no CUDA; use --device cpu"
        )


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Resolves `auto`: the fastest precision that the device computes in.

    That is amp_bf16 on a GPU with bfloat16, amp_fp16 on an older one (V100, T4, RTX 20), where
    bfloat16 is emulated and slow, and fp32 elsewhere.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "amp_bf16" if native else "amp_fp16"
