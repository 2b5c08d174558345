"""A form of the loss that a device does not have is refused before any work."""

import pytest
import torch

from neuclip.cli.app import main
from neuclip.config.loss_section import ComputeConfig
from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.training.loss_arithmetic import loss_arithmetic

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def of(device=CPU, **settings):
    return loss_arithmetic(ComputeConfig(**settings), device)


def test_the_defaults_hold_everywhere():
    assert of(CUDA) == of(CPU)
    assert (of().fused, of().compiled, of().low_precision) == ("auto", "off", None)
    assert of(CUDA, compile_loss="graphs").compiled == "graphs"


def test_fused_kernels_and_graphs_are_for_cuda():
    with pytest.raises(UserError, match=r"--fused-loss on: .* computes on cpu; use --fused-loss"):
        of(fused_loss="on")
    with pytest.raises(UserError, match=r"--compile-loss graphs .* on cpu; use .* compile"):
        of(compile_loss="graphs")


def test_fused_kernels_want_a_new_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7\.5"):
        of(CUDA, fused_loss="on")


def test_a_compiled_loss_is_for_one_process(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    with pytest.raises(UserError, match="is for one process, and this run has 2"):
        of(compile_loss="compile")


def test_the_command_line_refuses_before_it_looks_for_data(capsys):
    words = ["--train-data", "nowhere", "--fused-loss", "on", "--device", "cpu"]
    assert main(["train", *words]) == 2
    assert "--fused-loss on: the kernels are for CUDA" in capsys.readouterr().err
