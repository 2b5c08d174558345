"""The versions and the card. `python -m gpu_check.facts DEVICE` prints them as JSON."""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Facts:
    """What the parts run on.

    Attributes:
        device: `cuda` or `cpu`.
        card: name of the GPU; of the processor without one.
        capability: compute capability; (0, 0) without a GPU.
        total_gib: memory of the card.
        free_gib: its free memory at the start: less than the total if others use the card.
        versions: of Python, CUDA and the packages that matter.
    """

    device: str
    card: str
    capability: tuple[int, int]
    total_gib: float
    free_gib: float
    versions: dict[str, str | None]

    @property
    def on_cuda(self) -> bool:
        """Whether a GPU is checked."""
        return self.device == "cuda"

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        """The facts that another process printed."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {"capability": tuple(values["capability"])})

    def to_json(self) -> str:
        """For another process, or for the results."""
        return json.dumps(asdict(self))


def gather(wanted: str) -> Facts:
    """The facts of a device.

    Args:
        wanted: `auto`, `cuda` or `cpu`.

    Raises:
        SystemExit: CUDA is asked for and not there.
    """
    import torch

    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise SystemExit(
            f"no CUDA: torch {torch.__version__} sees no GPU; --device cpu runs every part at toy "
            "size"
        )
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {name: _version(name) for name in PACKAGES}
    if wanted == "cpu" or not found:
        return Facts("cpu", platform.processor() or platform.machine(), (0, 0), 0.0, 0.0, versions)
    free, total = torch.cuda.mem_get_info()
    return Facts(
        "cuda",
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        round(total / 2**30, 2),
        round(free / 2**30, 2),
        versions,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(gather(sys.argv[1]).to_json())
