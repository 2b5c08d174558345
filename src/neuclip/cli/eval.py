"""`neuclip eval`: a checkpoint on evaluation splits of one's own, or on DataComp's 38 tasks.

Imports no torch before there is something to judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags, counted
from neuclip.cli.options import Switch, check_range
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.suite import Suite, Task, load_suite

if TYPE_CHECKING:
    from neuclip.evaluation.datacomp.suite_run import Progress

_AVERAGE = "the moving average of "


@dataclass(frozen=True, kw_only=True)
class Eval(CheckpointFlags):
    """Judge a checkpoint: on evaluation splits (--val-data), or on DataComp's tasks (--data-dir).

    With neither, on the splits that the run was trained with: zero-shot classification, retrieval,
    error of the log-normalizers. DataComp's own command line works, too: --train_output_dir
    ./logs/name --data_dir DIR --epoch 24 --arch ViT-B-32.
    """

    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk"""
    train_output_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """DataComp's name for the run folder"""
    val_data: Annotated[
        str | None, arg(metavar="DIR[::DIR]", help_behavior_hint="(default: the run's)")
    ] = None
    """evaluation splits (folders of shards), several joined by ::"""
    data_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """folder of DataComp's evaluation sets"""
    tasks: Annotated[str, arg(metavar="KEY[,KEY]", help_behavior_hint="(default: all)")] = ""
    """DataComp: these tasks, such as imagenet1k,vtab/cifar100"""
    groups: Annotated[str, arg(metavar="NAME[,NAME]", help_behavior_hint="(default: all)")] = ""
    """DataComp: the tasks of these averages, such as imagenet,retrieval"""
    partial: Switch = False
    """DataComp: judge the sets that are there, and average over the tasks that have results"""
    allow_damage: Switch = False
    """judge what is left of a damaged set instead of refusing it"""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: in eval_results/)")
    ] = None
    """DataComp: the results file"""
    batch_size: int = 256
    """pairs per forward pass"""
    workers: int = 2
    """reading processes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    track: Annotated[Literal["filtering", "byod"] | None, arg(help_behavior_hint="")] = None
    """DataComp: accepted, and only of use for its leaderboard"""


@dataclass(frozen=True)
class Download:
    """Download DataComp's evaluation sets from the Hugging Face hub.

    Complete files are kept, so an interrupted download continues when the command is run again.
    HF_ENDPOINT, HF_HOME and HF_TOKEN are honoured. Flickr, MSCOCO and WinoGAViL are converted to
    the layout of the other sets; their sources stay in the hub's cache.
    """

    out: Annotated[Positional[Path], arg(metavar="DIR", help_behavior_hint="")]
    """folder of the evaluation sets"""
    tasks: Annotated[str, arg(metavar="KEY[,KEY]", help_behavior_hint="(default: all)")] = ""
    """these tasks, such as imagenet1k,vtab/cifar100"""
    groups: Annotated[str, arg(metavar="NAME[,NAME]", help_behavior_hint="(default: all)")] = ""
    """the tasks of these averages, such as imagenet,retrieval"""


def download(command: Download) -> int:
    """Downloads sets.

    Raises:
        UserError: a task is unknown, or a set cannot be downloaded or written.
    """
    from neuclip.evaluation.datacomp.download import download_task

    tasks = load_suite().select(_words(command.tasks), _words(command.groups))
    for number, task in enumerate(tasks, start=1):
        with terminal.progress() as progress:
            done = download_task(command.out, task, progress)
        state = f"{done.new} of {done.files} files downloaded" if done.new else "already complete"
        print(f"[{number}/{len(tasks)}] {task.name}: {state}", flush=True)
    return 0


def evaluate(command: Eval) -> int:
    """Judges, writes the results, and prints them.

    Raises:
        UserError: whatever of the command or the data cannot work.
    """
    check_range("batch-size", command.batch_size, ge=1)
    check_range("workers", command.workers, ge=0)
    run = _run(command)
    if command.data_dir is not None and command.val_data is not None:
        raise UserError("--val-data and --data-dir judge on different data: give one of them")
    if command.data_dir is not None:
        return _benchmark(command, run, command.data_dir)
    if command.train_output_dir is not None and command.val_data is None:
        raise UserError(
            "--data-dir is missing: the folder of DataComp's evaluation sets "
            "(neuclip data download-evalsets DIR fetches them)"
        )
    for flag, value in (
        ("tasks", command.tasks), ("groups", command.groups), ("partial", command.partial),
        ("iter", counted(command.iter)), ("arch", command.arch), ("out", command.out),
        ("track", command.track),
    ):  # fmt: skip
        if value:
            raise UserError(f"--{flag} goes with --data-dir, the folder of DataComp's sets")
    return _splits(command, run)


def _run(command: Eval) -> Path:
    if (command.run is None) == (command.train_output_dir is None):
        raise UserError(
            "eval needs one run folder or checkpoint: neuclip eval RUN, or --train_output_dir RUN"
        )
    run = command.run or command.train_output_dir
    assert run is not None
    return run


def _splits(command: Eval, run: Path) -> int:
    import torch

    from neuclip.evaluation.results import write_eval_result
    from neuclip.evaluation.split_evaluation import JudgeSettings, judge_split
    from neuclip.model.load import load_run
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group
    from neuclip.training.evaluating import open_splits

    # The processes only share work out and gather features: gloo does, whatever the device.
    with open_process_group(torch.device("cpu")) as launch:
        main = collectives.is_main()
        restored = load_run(command.choice(run), command.device, launch.local_rank)
        checkpoint = restored.checkpoint
        folders = command.val_data or restored.config.evaluation.val_data
        if not folders:
            raise UserError(
                f"run {run} was trained without evaluation splits: name some, --val-data (or the "
                "folder of DataComp's sets, --data-dir)"
            )
        settings = JudgeSettings(
            batch_size=command.batch_size,
            workers=command.workers,
            normalizer_batch_size=checkpoint.global_batch_size,
            seed=restored.config.seed,  # as in training, whose numbers these repeat
            allow_damage=command.allow_damage,
        )
        found: dict[str, Mapping[str, float]] = {}
        if main:
            what = _AVERAGE if checkpoint.averaged else ""
            print(f"judging {what}{checkpoint.path}", flush=True)
        for split in open_splits(folders):
            found[split.name] = metrics = judge_split(
                restored.encoder,
                split,
                settings,
                restored.loss,
                restored.clip.logit_scale,
                checkpoint.folder.gallery(split.name),
            )
            if main:
                write_eval_result(checkpoint.results, split.name, metrics)
    if main:
        terminal.print_metrics(found)
        print(f"written to {checkpoint.results}")
    return 0


def _benchmark(command: Eval, run: Path, data_dir: Path) -> int:
    suite = load_suite()
    tasks = _chosen(command, suite, data_dir)
    if command.track is not None:
        terminal.say(f"--track {command.track} is not needed: nothing is sent to a leaderboard")

    import torch

    from neuclip.evaluation.datacomp.benchmark import Benchmark, BenchmarkSettings
    from neuclip.evaluation.datacomp.suite_run import open_sets, run_benchmark
    from neuclip.model.load import load_pretrained
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group
    from neuclip.training.records.run_log import log_to

    log_to(None)

    # The processes only share work out and gather features: gloo does, whatever the device.
    with open_process_group(torch.device("cpu")) as launch:
        sets = open_sets(data_dir, tasks)
        model = load_pretrained(command.choice(run), command.device, launch.local_rank)
        settings = BenchmarkSettings(
            batch_size=command.batch_size,
            workers=command.workers,
            amp="cuda" if model.encoder.device.type == "cuda" else None,
            allow_damage=command.allow_damage,
        )
        checkpoint = model.checkpoint
        results = command.out or checkpoint.results
        main = collectives.is_main()
        if main:
            what = _AVERAGE if checkpoint.averaged else ""
            said = f"{what}{checkpoint.path} ({checkpoint.arch})"
            print(f"judging {said} on {len(tasks)} tasks", flush=True)
        benchmark = Benchmark(model.encoder, settings)
        found = run_benchmark(benchmark, sets, model.sha256, results, _tell)
    if main:
        scores = {key: result.metrics["main_metric"] for key, result in found.items()}
        averages = suite.averages(scores, partial=command.partial)
        terminal.print_benchmark([(task, scores[task.key]) for task in tasks], averages.values())
        print(f"suite {suite.version}; written to {results}")
    return 0


def _chosen(command: Eval, suite: Suite, data_dir: Path) -> list[Task]:
    """The tasks asked for; with `--partial` those of them that are there."""
    from neuclip.evaluation.datacomp.sets import is_there

    tasks = suite.select(_words(command.tasks), _words(command.groups))
    if not command.partial:
        return tasks
    there = [task for task in tasks if is_there(data_dir, task)]
    if not there:
        raise UserError(f"{data_dir} has no set of the {len(tasks)} tasks asked for")
    if len(there) < len(tasks):
        missing = [task.key for task in tasks if task not in there]
        terminal.say(f"{len(missing)} sets are not there and left out: {', '.join(missing)}")
    return there


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tell(progress: "Progress") -> None:
    place = f"[{progress.number}/{progress.total}] {progress.task.name}"
    score = progress.result.metrics["main_metric"]
    again = " (was there already)" if progress.reused else ""
    print(f"{place}: {progress.task.metric} {score:.4f}{again}", flush=True)
