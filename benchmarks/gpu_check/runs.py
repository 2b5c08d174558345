"""Training runs through the command line, for the parts that compare whole runs."""

from pathlib import Path

from gpu_check.part import Job
from neuclip.cli.app import main
from neuclip.data.demo.build import tiny_demo
from neuclip.run_folder import read_records


def demo_data(job: Job, characters: int) -> Path:
    """The embedded data, built from matplotlib's fonts: no download."""
    return tiny_demo(job.folder / "data", characters=characters).path


def train(job: Job, name: str, *flags: str) -> Path:
    """Trains a run.

    Returns:
        Its folder.

    Raises:
        SystemExit: it failed.
    """
    folder = job.folder / "runs" / name
    words = ["train", "--logs", str(folder.parent), "--name", name, *flags]
    if code := main(words):
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    return folder


def losses(folder: Path) -> list[float]:
    """The recorded losses of a run."""
    return [row["loss"] for row in read_records(folder / "metrics.jsonl") if row["kind"] == "train"]
