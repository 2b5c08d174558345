"""How a run computes its loss: the settings, checked against the device and the processes."""

import torch

from neuclip.config.loss_section import ComputeConfig
from neuclip.errors import UserError
from neuclip.method.arithmetic import Arithmetic
from neuclip.method.softmax.log_inner import obstacle_to_fused
from neuclip.parallel import collectives


def loss_arithmetic(compute: ComputeConfig, device: torch.device) -> Arithmetic:
    """The arithmetic that the settings ask for.

    Raises:
        UserError: this device or this number of processes does not have it.
    """
    if compute.fused_loss == "on" and (obstacle := obstacle_to_fused(device)):
        raise UserError(f"--fused-loss on: {obstacle}; use --fused-loss auto")
    if compute.compile_loss != "off" and collectives.world_size() > 1:
        raise UserError(
            f"--compile-loss {compute.compile_loss} is for one process, and this run has "
            f"{collectives.world_size()}, which exchange sums inside the loss; leave it out"
        )
    if compute.compile_loss == "graphs" and device.type != "cuda":
        raise UserError(
            f"--compile-loss graphs records CUDA graphs, and this run computes on {device.type}; "
            "use --compile-loss compile"
        )
    return Arithmetic(fused=compute.fused_loss, compiled=compute.compile_loss)
