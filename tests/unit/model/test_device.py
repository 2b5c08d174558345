"""Which device and which precision: scripted machines in place of real ones."""

import contextlib

import pytest
import torch

from neuclip.errors import UserError
from neuclip.model.device import choose_device, choose_precision

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs; returns the calls that make one of them current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    return current


def test_a_gpu_by_its_index_becomes_the_current_one(gpus):
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)]
    assert choose_device("cuda", 1, 2) == choose_device("auto", 1, 2) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("wanted", "processes", "message"),
    [
        ("cuda:2", 1, "--device cuda:2: 2 GPUs visible here; their indices are 0 to 1"),
        ("cuda:1", 2, "is for one process, and this run has 2: --device cuda gives each"),
        ("mps", 2, "is for one process"),
        ("mps", 1, "--device mps: this machine or this build of torch has no Metal"),
        ("tpu", 1, "--device tpu: must be auto, cpu, cuda, cuda:1 or mps"),
    ],
)
def test_a_device_that_is_not_there(gpus, monkeypatch, wanted, processes, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        choose_device(wanted, 0, processes)
    assert message in str(refused.value)


def test_a_single_gpu_is_counted_in_english(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="1 GPU visible here; its index is 0"):
        choose_device("cuda:1")


def test_an_index_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda:0: this machine .* has no CUDA"):
        choose_device("cuda:0")


def test_metal_computes_in_float32_by_default(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = choose_device("mps")
    assert device.type == "mps"
    assert choose_precision("auto", device) == "fp32"
    assert choose_precision("amp_fp16", device) == "amp_fp16"


@pytest.mark.parametrize(("native", "expected"), [(True, "amp_bf16"), (False, "amp_fp16")])
def test_auto_never_takes_emulated_bfloat16(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("fp32", CUDA) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
