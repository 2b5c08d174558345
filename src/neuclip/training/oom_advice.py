"""What to do when memory is exhausted."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from neuclip.catalogue.registry import NeuCLIPSettings
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "cannot allocate memory")


@contextmanager
def explained(config: RunConfig) -> Generator[None]:
    """Turns a failed allocation within a `with` block into what the user can do about it.

    Raises:
        UserError: memory ran out; names the settings that need less.
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
    """The settings that lower memory and are not yet in use, the cheapest first."""
    model, data = config.model, config.data
    knobs = [
        f"--batch-size below {data.batch_size}, with --accum-freq raised as much: the same global "
        "batch in smaller parts"
    ]
    if model.precision in {"auto", "fp32"}:
        knobs.append("--precision amp_bf16")
    if not model.grad_checkpointing:
        knobs.append("--grad-checkpointing: a third more time, far fewer activations")
    if not config.parallel.fsdp:
        knobs.append("--fsdp with several processes: parameters and optimiser shared out")
    if isinstance(config.method, NeuCLIPSettings):
        knobs.append(f"--num-prototypes below {config.method.num_prototypes}")
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"out of memory in a training step: {said}\nWhat lowers memory:\n" + "\n".join(
        f"  {knob}" for knob in knobs
    )
