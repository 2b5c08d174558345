import pytest
import torch

from neuclip.catalogue.neuclip import NeuCLIPSettings
from neuclip.catalogue.openclip import OpenCLIPSettings
from neuclip.cli.flag_table import table
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import ModelConfig, ParallelConfig
from neuclip.errors import UserError
from neuclip.training.oom_advice import advice_when_out_of_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 68719476736 bytes."),
    MemoryError(),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_exhausted_memory_names_the_knobs(error):
    config = RunConfig(method=NeuCLIPSettings(num_prototypes=8192))
    with pytest.raises(UserError) as caught, advice_when_out_of_memory(config):
        raise error
    message = str(caught.value)
    assert message.startswith("out of memory in a training step: ")
    for knob in ("--batch-size below 64", "--accum-freq", "--precision amp_bf16 (amp_fp16",
                 "--grad-checkpointing", "--fsdp", "--num-prototypes below 8192"):  # fmt: skip
        assert knob in message
    known = {f"--{flag.name}" for flag in table()}
    assert {"--batch-size", "--precision", "--grad-checkpointing", "--fsdp"} < known


def test_knobs_in_use_are_not_named():
    config = RunConfig(
        method=OpenCLIPSettings(),
        model=ModelConfig(grad_checkpointing=True, precision="amp_bf16"),
        parallel=ParallelConfig(fsdp=True),
    )
    with pytest.raises(UserError) as caught, advice_when_out_of_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    for knob in ("--grad-checkpointing", "--fsdp", "--num-prototypes", "--precision"):
        assert knob not in str(caught.value)


def test_a_real_allocation_that_fails_is_explained():
    with (
        pytest.raises(UserError, match="out of memory"),
        advice_when_out_of_memory(RunConfig()),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        advice_when_out_of_memory(RunConfig()),
    ):
        raise RuntimeError("shapes do not match")
