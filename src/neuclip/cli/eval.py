"""`neuclip eval`: evaluates a checkpoint on data of one's own, or on DataComp's 38 tasks.

Imports torch only when an evaluation starts.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags
from neuclip.cli.data import EvaluatedReadingFlags
from neuclip.cli.options import Switch, check_range
from neuclip.cli.probe_flags import ProbeFlags
from neuclip.config.data_sections import DataConfig
from neuclip.config.run_config import RunConfig
from neuclip.data.progress import Progress
from neuclip.errors import UserError, quantity
from neuclip.evaluation.datacomp.suite import Suite, Task, load_suite

if TYPE_CHECKING:
    from neuclip.evaluation.evaluate import FinishedSet
    from neuclip.evaluation.interfaces import EvaluationSettings
    from neuclip.evaluation.results import EvalResult
    from neuclip.evaluation.splits import EvaluationSplit


@dataclass(frozen=True, kw_only=True)
class Eval(ProbeFlags, CheckpointFlags, EvaluatedReadingFlags):
    """Evaluate a checkpoint on evaluation splits (--val-data) or DataComp's tasks (--data-dir).

    Without either flag, the splits given to training are used. Splits are evaluated by zero-shot
    classification, retrieval and the error of the log-normalizers; --probe adds classifiers that
    are trained on the features of labelled data. DataComp's own command line is
    accepted: --train_output_dir ./logs/name --data_dir DIR --epoch 24 --arch ViT-B-32.
    """

    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    checkpoint: Annotated[
        Path | None,
        arg(metavar="RUN", aliases=("--pretrained",), help_behavior_hint=""),
    ] = None
    """another way to give RUN"""
    train_output_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """DataComp's name for the run folder"""
    val_data: Annotated[
        str | None, arg(metavar="DATA[::DATA]", help_behavior_hint="(default: the run's)")
    ] = None
    """evaluation splits, separated by ::, each in a form of --train-data, a set of clip-benchmark
    or DataComp, or a folder per class"""
    val_templates: Annotated[
        str | None, arg(metavar="FILE", help_behavior_hint="(default: the data's own)")
    ] = None
    """prompts for the class names of the splits: a text file with one a line, or the prompts
    separated by ::, as in 'a photo of a {c}.'"""
    data_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """folder of DataComp's evaluation sets"""
    tasks: Annotated[str, arg(metavar="KEY[,KEY]", help_behavior_hint="(default: all)")] = ""
    """DataComp: evaluate these tasks, such as imagenet1k,vtab/cifar100"""
    groups: Annotated[str, arg(metavar="NAME[,NAME]", help_behavior_hint="(default: all)")] = ""
    """DataComp: evaluate the tasks of these averages, such as imagenet,retrieval"""
    partial: Switch = False
    """DataComp: skip missing sets, and average over the tasks with results"""
    allow_damage: Switch = False
    """evaluate the readable samples of a corrupt set instead of refusing it"""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: in eval_results/)")
    ] = None
    """results file"""
    batch_size: int = 256
    """images or texts per forward pass"""
    workers: int = 2
    """data workers"""
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N,mps}")] = "auto"
    """device to compute on"""
    track: Annotated[Literal["filtering", "byod"] | None, arg(help_behavior_hint="")] = None
    """DataComp: accepted without effect, it concerns the leaderboard"""


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
    """download these tasks, such as imagenet1k,vtab/cifar100"""
    groups: Annotated[str, arg(metavar="NAME[,NAME]", help_behavior_hint="(default: all)")] = ""
    """download the tasks of these averages, such as imagenet,retrieval"""


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
    """Evaluates a checkpoint, writes the results, and prints them.

    Raises:
        UserError: flags contradict each other, or checkpoint or data cannot be used.
    """
    check_range("batch-size", command.batch_size, ge=1)
    check_range("workers", command.workers, ge=0)
    command.check_probes()
    run = _run(command)
    if command.data_dir is not None and command.val_data is not None:
        raise UserError("--val-data and --data-dir name different data: give one of them")
    if command.data_dir is not None and command.val_templates is not None:
        raise UserError("--val-templates is for splits: DataComp's sets have prompts of their own")
    if command.data_dir is not None:
        return _datacomp(command, run, command.data_dir)
    if command.train_output_dir is not None and command.val_data is None:
        raise UserError(
            "--train_output_dir needs --data-dir, the folder of DataComp's evaluation sets "
            "(neuclip data download-evalsets DIR downloads them)"
        )
    for flag, value in (
        ("tasks", command.tasks),
        ("groups", command.groups),
        ("partial", command.partial),
        ("track", command.track),
    ):
        if value:
            raise UserError(f"--{flag} needs --data-dir, the folder of DataComp's evaluation sets")
    return _own_splits(command, run)


def _run(command: Eval) -> Path:
    given = [path for path in (command.run, command.checkpoint, command.train_output_dir) if path]
    if len(given) != 1:
        raise UserError(
            "eval needs one run folder or checkpoint: neuclip eval RUN (or --checkpoint RUN, or "
            "--train_output_dir RUN)"
        )
    return given[0]


def recorded_reading(recorded: DataConfig, given: Mapping[str, Any]) -> DataConfig:
    """How the data of a checkpoint's record are read: as recorded, with the flags that are given.

    The record may come from somebody else. Only a flag allows its `pipe:` sources to run commands.
    """
    return recorded.model_copy(update={"allow_pipe": False, **given})


def unrepeated(command: Eval, recorded: RunConfig) -> str:
    """Names flags of training that decide captions and prompts and were not given again.

    Empty if there are none. Accuracy depends on the form of the prompts: a model that was trained
    on bare names is worse with sentences.

    Args:
        command: of an evaluation whose splits are given.
        recorded: the settings of training.
    """
    captions = ("caption_key", "caption_key_probs", "caption_keys")
    trained: dict[str, Any] = {}
    if command.reading.keys().isdisjoint(captions):  # each excludes or needs another
        trained = {key: getattr(recorded.data, key) for key in captions}
    if command.val_templates is None:
        trained["val_templates"] = recorded.evaluation.val_templates
    flags: list[str] = []
    for key, value in trained.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{key.replace('_', '-')}", *map(str, values)]
    if not flags:
        return ""
    return (
        f"training evaluated with {shlex.join(flags)}, and this evaluation does not: give these "
        "flags too if the numbers shall be comparable"
    )


class _Opened(NamedTuple):
    """Splits, the data of `--probe-data`, and a line for each split without probes."""

    splits: "list[EvaluationSplit]"
    shared: "list[EvaluationSplit]"
    unprobed: list[str]


def _opened(command: Eval, recorded: RunConfig | None, progress: Progress) -> _Opened:
    """Opens the splits that are given, or those of a run's record, and the data of probes.

    Raises:
        UserError: data cannot be opened, a flag has no effect, or no split can have probes.
    """
    from neuclip.evaluation.own_splits import reopen_own_splits
    from neuclip.evaluation.split_layouts import EVALUATION, PROBED
    from neuclip.evaluation.splits import open_splits, require_label_classes, with_templates

    purpose = PROBED if command.probe else EVALUATION
    if recorded is None:
        reading = command.data_config()
        splits = open_splits(command.val_data, reading, progress, purpose)
    else:
        reading = recorded_reading(recorded.data, command.reading)
        splits = reopen_own_splits(recorded, reading, progress, purpose)
    if not splits:
        return _Opened([], [], [])
    shared = command.open_probe_data(reading, progress)
    require_label_classes([*splits, *shared], reading)
    unprobed = command.unprobed(splits, shared)
    return _Opened(with_templates(splits, command.val_templates), shared, unprobed)


def _own_splits(command: Eval, run: Path) -> int:
    done = evaluate_own_splits(command, run)
    if done.main:
        terminal.print_metrics(done.found)
        print(f"wrote {done.results}")
    return 0


class OwnResults(NamedTuple):
    """The results by split, their file, and whether this process is the main one."""

    found: "dict[str, EvalResult]"
    results: Path
    main: bool


def evaluate_own_splits(command: Eval, run: Path) -> OwnResults:
    """Evaluates a checkpoint on splits of one's own, and writes the results.

    Raises:
        UserError: checkpoint or data cannot be used.
    """
    import torch

    from neuclip.evaluation.evaluate import evaluate_sets
    from neuclip.evaluation.interfaces import EvaluatedModel
    from neuclip.evaluation.probes import Probes
    from neuclip.model.load import load_run
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group

    # The ranks only share work and gather features, for which gloo serves any device.
    with open_process_group(torch.device("cpu")) as launch, terminal.progress() as progress:
        # What is asked for is checked first: loading a large model takes longer.
        data = _opened(command, None, progress) if command.val_data else None
        restored = load_run(command.choice(run), command.device, launch.local_rank)
        checkpoint, config = restored.checkpoint, restored.config
        if data is None and config is not None:
            data = _opened(command, config, progress)
        if data is None or not data.splits:
            raise UserError(
                f"{run} records no evaluation splits: give some with --val-data, or DataComp's "
                "sets with --data-dir"
            )
        main = collectives.is_main()
        settings = _settings(command, progress)
        if config is not None:
            settings = replace(settings, seed=config.seed)  # repeats the numbers of training
        model = EvaluatedModel(
            restored.encoder, restored.loss, restored.clip.logit_scale, checkpoint.global_batch_size
        )
        results = command.out or checkpoint.results
        if main:
            names = ", ".join(split.name for split in data.splits)
            _announce(checkpoint.shown, checkpoint.averaged, names, data.unprobed)
            if command.val_data and config is not None and (said := unrepeated(command, config)):
                terminal.say(said)
        probe = command.probe_settings()
        probes = None if probe is None else Probes(restored.encoder, settings, probe, data.shared)
        done = evaluate_sets(model, data.splits, settings, results, probes=probes)
        return OwnResults({each.result.key: each.result for each in done}, results, main)


def _datacomp(command: Eval, run: Path, data_dir: Path) -> int:
    suite = load_suite()
    tasks = _chosen(command, suite, data_dir)
    if command.track is not None:
        terminal.say(f"--track {command.track} is not needed: nothing is sent to a leaderboard")

    import torch

    from neuclip.evaluation.datacomp.sets import open_tasks
    from neuclip.evaluation.evaluate import evaluate_sets
    from neuclip.evaluation.interfaces import EvaluatedModel
    from neuclip.evaluation.probes import Probes
    from neuclip.model.load import load_pretrained
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group

    # The ranks only share work and gather features, for which gloo serves any device.
    with open_process_group(torch.device("cpu")) as launch, terminal.progress() as progress:
        probe = command.probe_settings()
        sets = open_tasks(data_dir, tasks, training=probe is not None)
        shared = command.open_probe_data(command.data_config(), progress)
        unprobed = command.unprobed(sets, shared)
        loaded = load_pretrained(command.choice(run), command.device, launch.local_rank)
        main = collectives.is_main()
        settings = _settings(command, progress)
        if loaded.encoder.device.type == "cuda":
            settings = replace(settings, amp="cuda")
        checkpoint = loaded.checkpoint
        results = command.out or checkpoint.results
        if main:
            name = tasks[0].name if len(tasks) == 1 else quantity(len(tasks), "task")
            shown = f"{checkpoint.shown} ({checkpoint.arch})"
            _announce(shown, checkpoint.averaged, name, unprobed)
        model = EvaluatedModel(loaded.encoder)
        probes = None if probe is None else Probes(loaded.encoder, settings, probe, shared)
        finished: list[FinishedSet] = []
        for done in evaluate_sets(model, sets, settings, results, loaded.sha256, probes):
            finished.append(done)
            if main:
                _report(done, suite)
    if main:
        _print_suite(command, suite, finished)
        print(f"suite {suite.version}; wrote {results}")
    return 0


def _settings(command: Eval, progress: Progress) -> "EvaluationSettings":
    """The flags as settings; the main process reports progress."""
    from neuclip.evaluation.interfaces import EvaluationSettings
    from neuclip.parallel import collectives

    return EvaluationSettings(
        batch_size=command.batch_size,
        workers=command.workers,
        stall_limit=command.data_config().data_timeout,
        allow_damage=command.allow_damage,
        progress=progress if collectives.is_main() else None,
    )


def _announce(checkpoint: Path | str, averaged: bool, data: str, unprobed: Sequence[str]) -> None:
    average = "the moving average of " if averaged else ""
    print(f"evaluating {average}{checkpoint} on {data}", flush=True)
    for line in unprobed:
        terminal.say(line)


def _print_suite(command: Eval, suite: Suite, finished: "list[FinishedSet]") -> None:
    """Prints the main metric of each task, the averages, and the probes."""
    results = [(suite.tasks[done.data.key], done.result) for done in finished]
    rows = [(task, result.metrics["main_metric"]) for task, result in results]
    scores = {task.key: score for task, score in rows}
    terminal.print_benchmark(rows, suite.averages(scores, partial=command.partial).values())
    probed = [(task, result) for task, result in results if "num_probe_samples" in result.metrics]
    if command.probe and probed:
        print()
        terminal.print_probes(probed)


def _report(done: "FinishedSet", suite: Suite) -> None:
    score = done.result.metrics["main_metric"]
    reused = " (reused)" if done.reused else ""
    metric = suite.tasks[done.data.key].metric
    print(
        f"[{done.number}/{done.total}] {done.data.title}: {metric} {score:.4f}{reused}", flush=True
    )


def _chosen(command: Eval, suite: Suite, data_dir: Path) -> list[Task]:
    """The tasks to evaluate; with `--partial`, those whose sets exist."""
    from neuclip.evaluation.datacomp.sets import exists

    tasks = suite.select(_words(command.tasks), _words(command.groups))
    if not command.partial:
        return tasks
    found = [task for task in tasks if exists(data_dir, task)]
    if not found:
        raise UserError(f"{data_dir} has none of the {len(tasks)} evaluation sets")
    if len(found) < len(tasks):
        missing = [task.key for task in tasks if task not in found]
        terminal.say(f"skipping {len(missing)} missing sets: {', '.join(missing)}")
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
