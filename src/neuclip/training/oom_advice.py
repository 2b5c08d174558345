"""Turns out-of-memory errors into advice."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from neuclip.catalogue.neuclip import NeuCLIPPoolSettings, NeuCLIPSettings
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "cannot allocate memory")


@contextmanager
def advice_when_out_of_memory(config: RunConfig) -> Generator[None]:
    """Reports a failed allocation in a `with` block with the settings that lower memory.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(_advice(config, error)) from None
    except RuntimeError as error:
        if not any(text in str(error).lower() for text in _CPU_MESSAGES):
            raise
        raise UserError(_advice(config, error)) from None


def _advice(config: RunConfig, error: Exception) -> str:
    """Lists the settings that lower memory and are not yet used, the cheapest first."""
    model, data = config.model, config.data
    knobs = [
        f"--batch-size below {data.batch_size} and a higher --accum-freq: the same global batch in "
        "smaller parts"
    ]
    if model.precision in {"auto", "fp32"}:
        knobs.append("--precision amp_bf16 (amp_fp16 on a GPU older than A100 or RTX 30)")
    if not model.grad_checkpointing:
        knobs.append("--grad-checkpointing: far fewer activations for a third more time")
    if not config.parallel.fsdp:
        knobs.append("--fsdp over several processes: shards the parameters and the optimiser")
    if isinstance(config.method, NeuCLIPSettings):
        knobs.append(f"--num-prototypes below {config.method.num_prototypes}")
    if isinstance(config.method, NeuCLIPPoolSettings):
        knobs.append(f"--pool-size below {config.method.pool_size}")
    message = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"out of memory in a training step: {message}\nTo lower memory:\n" + "\n".join(
        f"  {knob}" for knob in knobs
    )
