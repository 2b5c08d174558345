"""Compares speed, memory and values of the fused kernels, the row blocks and open_clip's losses.

    python benchmarks/fused_kernel.py --batch-sizes 4096 8192 16384 32768 65536

Needs CUDA and Triton. All take turns at every batch size. Times are medians of CUDA events; times
and the allocator's peaks are given as ratios to ClipLoss. A batch size that exceeds the device
memory is recorded as such. Writes `fused_kernel_CARD_PRECISION.json` into benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_check.repeats import summary, timed
from open_clip.loss import ClipLoss, SigLipLoss
from recorded import RESULTS, save
from torch import Tensor

from neuclip import create_loss
from neuclip.method.arithmetic import Arithmetic
from neuclip.method.choices import FusedLoss
from neuclip.method.softmax.log_inner import obstacle_to_fused

FORMAT = 2
SCALE, BIAS = 50.0, -10.0
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """The features that all losses take."""

    batch: int
    dim: int
    device: torch.device

    def features(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Pairs that are more similar than others, as after some training."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2, self.batch, self.dim, generator=generator)
        features[1] += features[0]
        features = features.to(self.device, dtype)
        return torch.nn.functional.normalize(features, dim=-1)


@dataclass(frozen=True)
class Contender:
    """A loss, called with autocast or without; `exact` is the same loss in float64."""

    loss: Loss
    exact: Loss
    autocast: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast to bfloat16, if it is for that."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def passes(self, features: Tensor, *, exactly: bool = False) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient by the features."""
        leaf = features.detach().requires_grad_()
        scale, bias = (leaf.new_tensor(value).requires_grad_() for value in (SCALE, BIAS))
        with nullcontext() if exactly else self.context(features.device):
            value = (self.exact if exactly else self.loss)(leaf[0], leaf[1], scale, bias)
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad


def ours(name: str, setting: Setting, fused: FusedLoss = "off") -> Loss:
    """A loss of this package."""
    loss = create_loss(name, embed_dim=setting.dim).to(setting.device)
    loss.attach(arithmetic=Arithmetic(fused=fused))
    return loss


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's ClipLoss; it takes a bias since version 3."""
    return ClipLoss()(image, text, scale)


def contenders(setting: Setting) -> dict[str, Contender]:
    """All that run on the device, by name."""
    exact, exact_siglip = ours("openclip", setting), ours("siglip", setting)
    found = {
        "ClipLoss": Contender(clip_loss, exact),
        "blocks": Contender(ours("openclip", setting), exact),
        "ClipLoss bfloat16": Contender(clip_loss, exact, autocast=True),
        "blocks bfloat16": Contender(ours("openclip", setting), exact, autocast=True),
        "SigLipLoss": Contender(SigLipLoss(), exact_siglip),
        "siglip": Contender(ours("siglip", setting), exact_siglip),
    }
    if obstacle_to_fused(setting.device) is None:
        fused = ours("openclip", setting, "on")
        found["fused"] = Contender(fused, exact)
        found["fused bfloat16"] = Contender(fused, exact, autocast=True)
    return found


def errors(setting: Setting) -> dict[str, dict[str, float]]:
    """Relative errors of values and gradients against float64; open_clip's too, to compare."""
    features = setting.features()
    found = {}
    for name, contender in contenders(setting).items():
        value, grad = contender.passes(features)
        exact, exact_grad = contender.passes(features.double(), exactly=True)
        found[name] = {
            "value_error": float((value - exact).abs() / exact.abs()),
            "gradient_error": float((grad - exact_grad).norm() / exact_grad.norm()),
        }
    return found


def measure(setting: Setting, repeats: int) -> dict[str, dict[str, float | str]]:
    """Times and peak memory of forward and backward passes."""
    features, cuda = setting.features(), setting.device.type == "cuda"
    found: dict[str, dict[str, float | str]] = {}
    times: dict[str, list[float]] = {}
    everybody = contenders(setting)
    for number in range(repeats + 2):  # two warm-up rounds, in which Triton compiles
        for name, contender in everybody.items():
            if "failed" in found.get(name, {}):
                continue
            before = 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                taken = timed(lambda one=contender: one.passes(features), setting.device.type)
            except torch.cuda.OutOfMemoryError:
                found[name] = {"failed": "out of memory"}
                torch.cuda.empty_cache()
                continue
            if number >= 2:
                times.setdefault(name, []).append(taken)
            found[name] = {}
            if cuda:
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                found[name]["peak_mb"] = round(peak, 1)
    for name, values in times.items():
        found[name] |= summary(values)
    base = found["ClipLoss"]
    for row in found.values():
        row |= {
            f"{key}_over_clip_loss": round(float(row[key]) / float(base[key]), 4)
            for key in ("peak_mb", "milliseconds")
            if key in row and key in base
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precision", choices=["highest", "high"], default="highest")
    parser.add_argument("--out", type=Path, help="result file; by default in benchmarks/results/")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fused_kernel.py: no CUDA device; the fused kernels need one")
    device = torch.device("cuda", 0)
    if obstacle := obstacle_to_fused(device):
        sys.exit(f"fused_kernel.py: {obstacle}")
    torch.set_float32_matmul_precision(args.precision)
    found = {}
    for batch in args.batch_sizes:
        setting = Setting(batch, args.embed_dim, device)
        found[batch] = measure(setting, args.repeats)
        print(batch, found[batch], flush=True)
    card = torch.cuda.get_device_name().replace(" ", "-")
    path = args.out or RESULTS / f"fused_kernel_{card}_{args.precision}.json"
    save(path, FORMAT, device, {"matmul_precision": args.precision, "batch_sizes": found})


if __name__ == "__main__":
    main()
