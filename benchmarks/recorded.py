"""Result files of the benchmarks, with date, command, machine and the version of their format."""

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def check_version(path: Path, version: int) -> None:
    """Refuses to overwrite results that another version of the benchmark measured.

    Raises:
        SystemExit: the file has another format; the message gives the remedy.
    """
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8")).get("format", 1)
    if found != version:
        raise SystemExit(
            f"{path} has format {found}, this benchmark writes format {version}, which is not "
            "comparable: move the old file away, or choose another file with --out"
        )


def save(path: Path, version: int, device: torch.device, content: dict) -> None:
    """Writes a result file."""
    check_version(path, version)
    script = Path(sys.argv[0])
    head = {
        "format": version,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "machine": machine(device),
        "load_average": [round(load, 1) for load in os.getloadavg()],  # includes other programs
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
