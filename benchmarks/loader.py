"""Compares the images per second and core of neuclip's and open_clip's loaders on the same shards.

    python benchmarks/loader.py --samples 2000 --repeats 3

open_clip's training loader needs webdataset and pandas, which neuclip does not need. A separate
virtual environment in a temporary folder sees the packages of the present environment and adds
these two. Both loaders run there in turns, each in its own process that reads one epoch without
worker processes, so that CPU seconds are the cost for one core. Both produce batches of ViT-B-32's
random crops and tokens. Writes `loader_MODEL_SIDEpx.json` into benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NEEDED = ("webdataset==0.2.86", "pandas")
CONTENDERS = ("open_clip", "neuclip", "neuclip --full-decode")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512, help="side of the JPEGs in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.contender:
        print(json.dumps(run_contender(args)))
        return
    from photographs import make_shards

    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder) / "venv")
        shards = Path(folder) / "shards"
        print(f"writing {args.samples} pairs", flush=True)
        mean_bytes = make_shards(shards, args.samples, args.side)
        rounds = {name: [] for name in CONTENDERS}
        for repeat in range(args.repeats):
            for name in CONTENDERS:
                rounds[name].append(measure(python, name, shards, args))
                found = rounds[name][-1]
                print(
                    f"round {repeat + 1}: {name:22} {found['images'] / found['cpu']:7.1f} images/s "
                    f"per core, {found['images'] / found['wall']:7.1f} per second of wall time",
                    flush=True,
                )
    report(args, mean_bytes, rounds)


def make_environment(folder: Path) -> str:
    """An environment that sees the present packages and adds those of open_clip's loader."""
    print("setting up webdataset in a separate environment", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = subprocess.run(
        [python, "-c", ask], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED], check=True)
    # After the installation, so that pip does not mistake this environment's numpy for its own.
    ours = sysconfig.get_path("purelib")
    source = Path(__file__).parents[1] / "src"
    (Path(theirs) / "neuclip_benchmark.pth").write_text(f"{ours}\n{source}\n", encoding="utf-8")
    return str(python)


def measure(python: str, name: str, shards: Path, args: argparse.Namespace) -> dict[str, float]:
    words = ["--contender", name, "--shards", str(shards), "--samples", str(args.samples)]
    words += ["--batch-size", str(args.batch_size), "--model", args.model]
    done = subprocess.run(
        [python, __file__, *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_contender(args: argparse.Namespace) -> dict[str, float]:
    """Reads one epoch with one loader in this process."""
    import torch

    from neuclip.model.clip import build_clip

    torch.set_num_threads(1)  # as in a worker process
    clip = build_clip(args.model, "fp32", torch.device("cpu"))
    make = open_clip_loader if args.contender == "open_clip" else our_loader
    batches = make(args, clip)
    images, wall, cpu = 0, time.perf_counter(), time.process_time()
    for shape in batches:
        images += shape[0]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"images": images, "wall": wall, "cpu": cpu}


def open_clip_loader(args, clip):
    from open_clip_train.data import get_wds_dataset

    files = sorted(Path(args.shards).glob("*.tar"))
    options = argparse.Namespace(
        train_data=f"{args.shards}/{{00000..{len(files) - 1:05d}}}.tar",
        train_num_samples=args.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=args.batch_size,
        workers=0,
        world_size=1,
        seed=0,
    )
    data = get_wds_dataset(
        options, clip.train_transform, is_train=True, epoch=0, floor=True, tokenizer=clip.tokenize
    )
    for images, tokens in data.dataloader:
        assert images.shape[1:] == (3, clip.image_size, clip.image_size)
        assert tokens.shape[1:] == (77,)
        yield images.shape


def our_loader(args, clip):
    from neuclip.data.decode import ImageDecoder
    from neuclip.data.loader import LoaderSettings, TrainLoader
    from neuclip.data.sources.shards import build_index, expand_patterns

    decode = ImageDecoder.for_model(clip.image_size, full=args.contender.endswith("--full-decode"))
    index = build_index(expand_patterns(args.shards))
    settings = LoaderSettings(args.batch_size, decode=decode)
    for batch in TrainLoader(index, clip.train_transform, clip.tokenize, settings):
        assert batch.images.shape[1:] == (3, clip.image_size, clip.image_size)
        yield batch.images.shape


def report(args, mean_bytes: float, rounds: dict[str, list[dict[str, float]]]) -> None:
    per_core = {
        name: statistics.median(found["images"] / found["cpu"] for found in each)
        for name, each in rounds.items()
    }
    ratios = {name: per_core[name] / per_core["open_clip"] for name in CONTENDERS[1:]}
    import PIL
    import torch

    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/loader.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "webdataset": NEEDED[0].partition("==")[2],
        "jpeg": {"side": args.side, "mean_bytes": round(mean_bytes)},
        "images_per_core_second": {name: round(value, 1) for name, value in per_core.items()},
        "ratio_to_open_clip": {name: round(value, 3) for name, value in ratios.items()},
        "rounds": rounds,
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times open_clip's images/s per core")
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"loader_{args.model}_{args.side}px.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
