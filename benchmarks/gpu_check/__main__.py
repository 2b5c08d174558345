"""The command line of the check: see `scripts/gpu_check.sh`."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_check.facts import Facts
from gpu_check.part import append
from gpu_check.plan import PARTS
from gpu_check.runner import Check


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description="Checks and measures neuclip on a GPU, and writes results as it goes.",
        epilog="Parts: " + "; ".join(f"{part.name}: {part.asks}" for part in PARTS),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check"), help="folder for the results"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which all stops")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so on a CPU")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: must be above 0")
    return args


def main() -> None:
    args = arguments()
    # In a process of its own: this one must not hold memory of the card.
    asked = subprocess.run(
        [sys.executable, "-m", "gpu_check.facts", args.device], capture_output=True, text=True
    )
    if asked.returncode:
        raise SystemExit(asked.stderr.strip().rpartition("\n")[2])
    facts = Facts.from_json(asked.stdout.splitlines()[-1])
    toy = args.toy or not facts.on_cuda
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        check = Check(facts, args.out.resolve(), Path(scratch), args.minutes, toy)
        check.results.unlink(missing_ok=True)
        check.log.unlink(missing_ok=True)
        append(check.results, {"part": "facts", "toy": toy, **vars(facts)})
        failed = check.run([part for part in PARTS if part.name in args.parts])
    print(f"results in {check.results}, output in {check.log}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
