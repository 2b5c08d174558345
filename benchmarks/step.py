"""Measures time and peak memory of a training step by part, for several methods side by side.

    python benchmarks/step.py --model ViT-B-32 --batch-size 64 --num-prototypes 4096 --repeats 5
    python benchmarks/step.py --model glyph-tiny --methods all --train-data demo/train

The methods take turns in one process with the same encoders, so that noise of the machine affects
all of them. Each round gives ratios to `openclip`; their median is reported. The parts:

    data       waiting for the next batch (with --train-data; otherwise batches are random)
    encode     forward pass of the encoders  backward    the full backward pass
    gather     embeddings of all ranks       optimizer   norm of the gradient, and AdamW
    loss       logits of the batch           normalizer  prototypes, pool, tables
    other      the rest of the step

torch's profiler counts the memory in separate steps after the timed ones: the peak of the tensors'
bytes in each part, above the bytes at the start of the step; on CUDA without library workspaces.
The script checks the machine's memory before it times anything. Writes
`step_parts_MODEL_bBATCH_mPROTOTYPES_DEVICE.json` into benchmarks/results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from recorded import RESULTS, check_version, save
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.registry import METHODS, method_settings
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.method.arithmetic import Arithmetic
from neuclip.model.clip import Clip, build_clip
from neuclip.model.device import choose_device, choose_precision
from neuclip.model.prepare import compile_blocks
from neuclip.parallel import collectives
from neuclip.training.device_prefetch import DevicePrefetcher
from neuclip.training.optim import Optimizer
from neuclip.training.records.step_timer import StepTimer
from neuclip.training.step import TrainingStep

FORMAT = 2
MARK = "part:"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="glyph-tiny, ViT-B-32, ViT-B-16, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-prototypes", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", default=["openclip", "neuclip_pool", "neuclip"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train-data", help="train on this data; by default on random batches")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the towers' blocks")
    parser.add_argument("--compile-loss", choices=["off", "compile", "graphs"], default="off")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--no-profile", action="store_true", help="leave out the memory by part")
    parser.add_argument("--out", type=Path, help="result file; by default in benchmarks/results/")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args(words)
    if args.methods == ["all"]:
        args.methods = list(METHODS)
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; known: {', '.join(METHODS)}")
    if "openclip" not in args.methods:
        args.methods = ["openclip", *args.methods]  # the ratios' base
    return args


@dataclass(frozen=True)
class Setting:
    """The parts that all contenders share."""

    args: argparse.Namespace
    clip: Clip
    device: torch.device
    optimizer: Optimizer
    next_batch: Callable[[], Batch]
    num_samples: int


class Contender:
    """One method with the shared encoders."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._setting, self._timer = setting, StepTimer(setting.device)
        run = RunFacts(
            setting.clip.embed_dim,
            steps_per_epoch=1,
            num_samples=setting.num_samples,
            global_batch_size=setting.args.batch_size,
        )
        settings = method_settings(name, values_for(name, setting.args.num_prototypes))
        loss = build_loss(settings, run).to(setting.device)
        loss.attach(section=self._part, arithmetic=Arithmetic(compiled=setting.args.compile_loss))
        self._step = TrainingStep(
            setting.clip, setting.clip.towers, loss, setting.optimizer, setting.device, self._part
        )
        self._feed = DevicePrefetcher(1, setting.device)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        with self._timer.section(name), record_function(MARK + name):
            yield

    def run(self) -> dict[str, float]:
        """Runs one step; returns its seconds by part and in total."""
        with gathers_counted(self._part):
            start, start_cpu = time.perf_counter(), time.process_time()
            self._timer.reset()
            with self._part("data"):
                batch = self._feed.next_step(iter([self._setting.next_batch()]))
            self._setting.optimizer.set_rates(0)
            self._step(batch)
            seconds = self._timer.seconds()
            total, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            return {**seconds, "total": total, "cpu": cpu}

    def flops(self) -> int:
        """Operations of one step's matrix products and convolutions, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()

    def allocated(self) -> float:
        """Peak of all that one step has allocated on the card, weights included, in MiB."""
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def memory(self) -> dict[str, float]:
        """Peak memory of one step's tensors by part, in MiB."""
        activities = [ProfilerActivity.CPU]
        if self._setting.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities, profile_memory=True)
        with profiler, record_function(MARK + "other"):
            self.run()
        return peaks(profiler, self._setting.device)


def values_for(name: str, size: int) -> dict[str, object]:
    """The settings of a contender that have no default, and the size of its pool or network."""
    values = {"num_prototypes": size, "pool_size": size, "gamma_decay_epochs": 10.0}
    fields = METHODS[name].settings.model_fields
    if "gamma" in fields and fields["gamma"].default is None:
        values["gamma"] = 0.5
    return {key: value for key, value in values.items() if key in fields}


@contextmanager
def gathers_counted(part: Callable) -> Iterator[None]:
    """Times the exchange of embeddings between ranks as a separate part."""
    names = ("gather", "gather_constant", "scatter_sum")
    before = {name: getattr(collectives, name) for name in names}

    def counted(function: Callable) -> Callable:
        def call(*arguments: object) -> torch.Tensor:
            with part("gather"):
                return function(*arguments)

        return call

    for name, function in before.items():
        setattr(collectives, name, counted(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(collectives, name, function)


def peaks(profiler: profile, device: torch.device) -> dict[str, float]:
    """Peak memory above the start of a step, by innermost part."""
    events = profiler.profiler.kineto_results.events()
    parts = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix(MARK))
        for event in events
        if event.name().startswith(MARK)
    ]
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else None
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and (wanted is None or event.device_type() == wanted)
    )
    now, peak = 0, {}
    for moment, change in changes:
        now += change
        inside = [part for part in parts if part[0] <= moment <= part[1]]
        if inside:
            name = max(inside)[2]  # the part that started last
            peak[name] = max(peak.get(name, 0), now)
    return {name: round(value / 2**20, 1) for name, value in peak.items()}


# --- the machine ------------------------------------------------------------------------------


def check_memory(clip: Clip, args: argparse.Namespace, device: torch.device) -> float:
    """A lower bound of the memory that the benchmark needs, in GiB.

    It counts weights, gradients and two moments; the tensors that the backward pass keeps per pair
    (measured on two), times the batch; and the prototypes with their pools and moments.

    Raises:
        UserError: the bound exceeds the free memory.
    """
    saved: dict[int, int] = {}  # bytes by storage; saved views of weights cost nothing
    weights = {p.untyped_storage().data_ptr() for p in clip.towers.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    two = random_batch(clip, 2)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        images = two.images.to(device, clip.input_dtype)
        with clip.autocast(device):
            outputs = clip.towers(images, two.tokens.to(device))  # keeps the saved tensors alive
    towers = 4 * sum(p.nbytes for p in clip.towers.parameters())
    network = (
        2 * 4 * 4 * args.num_prototypes * clip.embed_dim
        if {"neuclip", "neuclip_pool"} & {*args.methods}
        else 0
    )
    needed = (towers + sum(saved.values()) / len(two) * args.batch_size + network) / 2**30
    del outputs
    free = free_memory(device)
    if needed > 0.95 * free:
        raise UserError(
            f"{args.model} at batch {args.batch_size} needs at least {needed:.1f} GiB, of "
            f"{free:.1f} GiB free on {device}: lower --batch-size to "
            f"{max(2, int(args.batch_size * 0.9 * free / needed))} or less"
        )
    return needed


def free_memory(device: torch.device) -> float:
    """Free memory in GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    fields = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    (available,) = [line.split()[1] for line in fields if line.startswith("MemAvailable")]
    return int(available) / 2**20


# --- batches --------------------------------------------------------------------------------


def random_batch(clip: Clip, size: int) -> Batch:
    captions = [f"a photo of object number {i} on a table" for i in range(size)]
    return Batch(
        images=torch.randn(size, 3, clip.image_size, clip.image_size),
        tokens=clip.tokenize(captions),
        sample_ids=torch.arange(size),
        class_indices=torch.full((size,), -1),
        captions=captions,
        keys=captions,
    )


def batches(args: argparse.Namespace, clip: Clip) -> tuple[Callable[[], Batch], int]:
    """A function that returns the next batch, and the bound of the sample ids."""
    if args.train_data is None:
        batch = random_batch(clip, args.batch_size)
        return (lambda: batch), args.batch_size
    source = open_source(args.train_data)
    settings = LoaderSettings(args.batch_size, workers=args.workers)
    loader = TrainLoader(source, clip.train_transform, clip.tokenize, settings)

    def forever() -> Iterator[Batch]:
        while True:
            yield from loader

    endless = forever()
    return (lambda: next(endless)), len(source)


# --- the report -----------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    path = args.out or RESULTS / (
        f"step_parts_{args.model}_b{args.batch_size}_m{args.num_prototypes}"
        f"_{choose_device(args.device).type}.json"
    )
    if not args.no_save:
        check_version(path, FORMAT)
    try:
        content = measure(args)
    except UserError as error:
        raise SystemExit(f"cannot measure on this machine: {error}") from None
    for name, row in content["methods"].items():
        print(
            f"{name:12} {row['seconds']['total']:8.3f} s  {row['ratio_to_openclip']:.3f} x openclip"
            f" ({row['cpu_ratio_to_openclip']:.3f} in CPU seconds)"
            f"  normalizer {row['normalizer_share']:.2%}"
            f"  peak {max(row['peak_mib'].values(), default=0)} MiB"
        )
    if not args.no_save:
        save(path, FORMAT, choose_device(args.device), content)


def measure(args: argparse.Namespace) -> dict:
    """Times the methods of the command line.

    Raises:
        UserError: the device does not exist, or its memory is too small.
    """
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    torch.manual_seed(0)
    init = {"logit_bias": -10.0} if "siglip" in args.methods else None
    clip = build_clip(args.model, precision, device, init)
    needed = check_memory(clip, args, device)
    print(f"needs {needed:.1f} GiB, {free_memory(device):.1f} are free", flush=True)
    next_batch, num_samples = batches(args, clip)
    optimizer = Optimizer(clip.towers, resolve(RunConfig(), 1).optim, 1000)
    setting = Setting(args, clip, device, optimizer, next_batch, num_samples)
    contenders = {name: Contender(name, setting) for name in args.methods}
    flops = {name: contender.flops() for name, contender in contenders.items()}
    if args.compile:
        compile_blocks(clip.towers, "inductor")
    rounds = [
        {name: contender.run() for name, contender in contenders.items()}
        for _ in range(args.repeats + args.warmup)
    ][args.warmup :]
    methods = {}
    for name, contender in contenders.items():
        peaks = {} if args.no_profile else contender.memory()
        methods[name] = summary(name, rounds, peaks) | {"flops": flops[name]}
        if device.type == "cuda":
            methods[name]["allocated_mib"] = contender.allocated()
    return {"precision": precision, "repeats": args.repeats, "methods": methods}


def summary(name: str, rounds: list[dict[str, dict[str, float]]], memory: dict) -> dict:
    """Medians over the rounds."""
    rows = [each[name] for each in rounds]
    seconds = {
        part: round(statistics.median(row.get(part, 0.0) for row in rows), 6)
        for part in sorted({part for row in rows for part in row})
    }
    ratios, of_cpu = (
        [round(each[name][key] / each["openclip"][key], 4) for each in rounds]
        for key in ("total", "cpu")
    )
    return {
        "ratio_to_openclip": round(statistics.median(ratios), 4),
        "cpu_ratio_to_openclip": round(statistics.median(of_cpu), 4),
        "ratios": ratios,
        "cpu_ratios": of_cpu,
        "normalizer_share": round(seconds.get("normalizer", 0.0) / seconds["total"], 5),
        "seconds": seconds,
        "peak_mib": memory,
    }


if __name__ == "__main__":
    main()
