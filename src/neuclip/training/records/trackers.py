"""TensorBoard and Weights & Biases: the records of a run, with open_clip's names beside ours."""

import importlib
import importlib.util
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from neuclip.config.sections import OutputConfig
from neuclip.errors import Preempted, UserError, printable
from neuclip.files import write_whole, writing
from neuclip.masking import mask
from neuclip.training.records.sinks import Record, Sink

log = logging.getLogger("neuclip")

_IMAGENET = {"imagenet-val": "imagenet-zeroshot-val", "imagenet-v2": "imagenetv2-zeroshot-val"}
"""How open_clip calls its zero-shot sets."""


def check_packages(output: OutputConfig) -> None:
    """Checks that the packages of `--report-to` are installed, before anything is opened.

    Raises:
        UserError: one is not.
    """
    for package in output.trackers:
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


@contextmanager
def trackers(
    output: OutputConfig, run_dir: Path, config: dict[str, Any], processes: int = 1
) -> Generator[list[Sink]]:
    """Opens TensorBoard and W&B as `--report-to` asks, and closes them after the block.

    Args:
        output: the settings of the run's output.
        run_dir: the run folder.
        config: the settings of the run, for W&B.
        processes: of the run, for the speed of each.

    Raises:
        UserError: a package is not installed, or W&B cannot be opened.
    """
    batch = config.get("data", {}).get("global_batch_size")
    names = _Names(batch, processes)
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for tracker in output.trackers:
            opened = (
                _tensorboard(run_dir, names)
                if tracker == "tensorboard"
                else _wandb(output, run_dir, config, names)
            )
            sinks.append(stack.enter_context(opened))
        yield sinks


class _Names:
    """The scalars of a record, by name: ours, and open_clip's for the same values.

    Args:
        batch: the global batch size, if it is known.
        processes: of the run.
    """

    def __init__(self, batch: int | None, processes: int) -> None:
        self._batch, self._processes = batch, processes

    def scalars(self, record: Record) -> dict[str, float]:
        """`train/...`, `warm_start/...`, `eval/SPLIT/...`, and open_clip's `val/...`."""
        kind = record["kind"]
        if kind == "warning":
            return {}
        prefix = f"{kind}/" + (f"{record['split']}/" if kind == "eval" else "")
        values = {
            key: float(value)
            for key, value in record.get("metrics", record).items()
            if isinstance(value, int | float)
        }
        found = {prefix + key: value for key, value in values.items()}
        found |= {"epoch": float(record["epoch"])} if "epoch" in record else {}
        if kind == "train":
            found |= {f"train/{key}": value for key, value in self._speeds(values).items()}
        if kind == "eval" and (name := _IMAGENET.get(record["split"])):
            tops = {"acc1": "top1", "acc5": "top5"}
            found |= {f"val/{name}-{tops[k]}": v for k, v in values.items() if k in tops}
        return found

    def _speeds(self, values: Mapping[str, float]) -> dict[str, float]:
        """open_clip's names; times are means over the steps of a record, in seconds."""
        found: dict[str, float] = {}
        if "logit_scale" in values:
            found["scale"] = values["logit_scale"]
        speed = values.get("samples_per_second")
        if speed:
            found["samples_per_second_per_gpu"] = speed / self._processes
        if speed and self._batch:
            found["batch_time"] = self._batch / speed
            if "share_data" in values:
                found["data_time"] = found["batch_time"] * values["share_data"]
        return found


@contextmanager
def _tensorboard(run_dir: Path, names: _Names) -> Generator[Sink]:
    module = _optional("torch.utils.tensorboard", "tensorboard")
    folder = run_dir / "tensorboard"
    with writing(folder):
        writer = module.SummaryWriter(folder)

    def sink(record: Record) -> None:
        # The warm start comes before step 1, so its batches are counted on their own.
        step = record["warm_step"] if record["kind"] == "warm_start" else record["step"]
        with writing(folder):
            for name, value in names.scalars(record).items():
                writer.add_scalar(name, value, step)
            writer.flush()

    try:
        yield sink
    finally:
        writer.close()


@contextmanager
def _wandb(
    output: OutputConfig, run_dir: Path, config: dict[str, Any], names: _Names
) -> Generator[Sink]:
    module = _optional("wandb", "wandb")
    try:
        with _masked_command_line():
            run = module.init(
                project=output.wandb_project_name or os.environ.get("WANDB_PROJECT", "neuclip"),
                notes=output.wandb_notes,
                name=run_dir.name,
                id=_wandb_id(run_dir / "run_id"),
                resume="allow",
                dir=str(run_dir),
                config=config,
            )
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        why = printable(mask(" ".join(str(error).split())), 200).rstrip(".")
        raise UserError(
            f"--report-to wandb: {why}. `wandb login` or WANDB_API_KEY gives access; with "
            "WANDB_MODE=offline the run is kept on disk, for `wandb sync`"
        ) from None
    code = 1
    try:
        yield _WandbSink(run, names)
        code = 0
    except Preempted:
        run.mark_preempting()  # shown as preempted instead of failed
        raise
    finally:
        run.finish(exit_code=code)


class _WandbSink:
    """Logs records to a run of W&B, at the run's own steps.

    W&B drops what is logged at an earlier step than before. A resumed run repeats training records
    that its process logged before it was killed, and an evaluation may be of an older checkpoint:
    the former are left out, and the latter gets W&B's next step. Of a warm start, which has no
    steps, the last batch stays.
    """

    def __init__(self, run: Any, names: _Names) -> None:  # noqa: ANN401  wandb's run
        self._run, self._names = run, names
        self._failed = False

    def __call__(self, record: Record) -> None:
        """Logs a record; the first failure is reported, and training goes on without W&B."""
        step, reached = int(record["step"]), int(self._run.step)
        scalars = self._names.scalars(record)
        if self._failed or not scalars or (step < reached and record["kind"] != "eval"):
            return
        try:
            # open_clip logs the step among the values, too.
            self._run.log({**scalars, "step": step}, step=max(step, reached))
        except Exception as error:
            self._failed = True
            why = printable(mask(str(error)), 200)
            log.warning("W&B takes no more records (%s); metrics.jsonl has all of them", why)


@contextmanager
def _masked_command_line() -> Generator[None]:
    """Masks the secrets in `sys.argv` for a block: W&B keeps the command line of a run."""
    given, line = sys.argv, shlex.join(sys.argv)
    if (masked := mask(line)) != line:
        try:
            sys.argv = shlex.split(masked)
        except ValueError:  # a quote was masked, too
            sys.argv = [given[0], masked.partition(" ")[2]]
    try:
        yield
    finally:
        sys.argv = given


def _wandb_id(path: Path) -> str:
    """The id of the run in W&B, kept in the run folder: a resumed run continues its own curve.

    `WANDB_RUN_ID`, which sweeps set, is taken for a new run.
    """
    if not path.exists():
        write_whole(path, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _optional(module: str, package: str) -> Any:  # noqa: ANN401  a module
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _missing(package) from None


def _missing(package: str) -> UserError:
    return UserError(f"--report-to needs the package {package}: pip install 'neuclip[{package}]'")
