"""Reads damaged and hostile files, answers and requests of every kind, with fixed seeds.

    python benchmarks/fuzz_readers.py --cases 10000
    python benchmarks/fuzz_readers.py --case tar:1234      # one case again, with its traceback

A case writes files that are damaged at random, or well-formed and hostile, and reads them as the
commands do: it opens and decodes data, inspects, packs, reports, evaluates, resumes, downloads and
answers requests. It may end as

- `answer`: everything was read,
- `damage`: corrupt samples are reported and the others read,
- `refusal`: one message says why.

Anything else is a fault: `traceback`, `hang` (more than 20 s), `dead` (the process crashed) or
`memory` (more than 512 MB above the start of the case). Commands also may not print control
characters. Results go to `--log` as they come, and a second start with the same log continues.
At the end, `fuzz_readers.json` is written into benchmarks/results/, with every fault; for chosen
kinds, `fuzz_LABEL.json`.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from fuzzing import (
    data_kinds,
    run_kinds,
    runner,
    search_kinds,
    server_kinds,
    valid,
    weight_kinds,
)
from fuzzing.runner import Result, Totals

KINDS: dict[str, runner.Case] = {
    **data_kinds.KINDS,
    **weight_kinds.KINDS,
    **run_kinds.KINDS,
    **server_kinds.KINDS,
    **search_kinds.KINDS,
}
SLOW = {"resume": 16, "eval": 16, "report": 16, "hub": 4, "http": 4, "search": 2, "repository": 2,
        "sharded": 2, "inspect": 2, "image": 2, "image-headers": 2}  # fmt: skip
"""Kinds that have one turn in so many."""


def names(cases: int, first: int = 0) -> Iterator[str]:
    """The first cases, `KIND:SEED`: all kinds in turn."""
    number, turn = 0, first
    while True:
        for kind in KINDS:
            if turn % SLOW.get(kind, 1) == 0:
                if number == cases:
                    return
                yield f"{kind}:{turn}"
                number += 1
        turn += 1


def prepare(kinds: Iterable[str] = KINDS) -> None:
    """Makes the valid files, and loads what the cases import, before any process forks."""
    valid.pictures()
    if {*kinds} & {*weight_kinds.KINDS, *run_kinds.KINDS}:
        valid.plain_forms()
        valid.sharded()
    if "report" in kinds:
        run_kinds.report(valid.run_folder())  # loads what draws
    if "search" in kinds or "features" in kinds:
        search_kinds.engine()
    for work in (lambda: valid.parquet("snappy"), lambda: valid.arrow(None)):
        work()


def _known(log: Path | None) -> dict[str, Result]:
    """The results in a log, by case."""
    if log is None or not log.exists():
        return {}
    lines = log.read_text(encoding="utf-8").splitlines()
    return {result.case: result for result in (Result(**json.loads(line)) for line in lines)}


def _results(cases: list[str], known: dict[str, Result], log: Path | None) -> Iterator[Result]:
    """The results of cases; those that are known are not run again."""
    yield from (known[case] for case in cases if case in known)
    with contextlib.nullcontext() if log is None else log.open("a", encoding="utf-8") as out:
        for result in runner.run([case for case in cases if case not in known], KINDS):
            if out is not None:
                out.write(json.dumps(asdict(result)) + "\n")
                out.flush()
            if not result.good:
                print(f"--case {result.case}: {result.outcome}\n{result.detail}\n", flush=True)
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first cases")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="these kinds only")
    parser.add_argument("--label", help="in the name of the result file of these kinds")
    parser.add_argument("--case", metavar="KIND:SEED", help="run one case, in this process")
    parser.add_argument("--part", default="0/1", help="I/N: part I of N that share a log")
    parser.add_argument("--commit", help="of the package, for the result file")
    parser.add_argument("--log", type=Path, help="results, one a line")
    options = parser.parse_args()
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            prepare([options.case.partition(":")[0]])
            case = KINDS[options.case.partition(":")[0]]
            print(case(Path(folder), random.Random(options.case)))
        return
    import recorded
    import torch

    torch.set_num_threads(1)
    chosen = options.kinds or list(KINDS)
    cases = [
        case for case in names(options.cases, options.first) if case.partition(":")[0] in chosen
    ]
    part, parts = map(int, options.part.split("/"))
    cases = cases[part::parts]
    known = _known(options.log)
    if not known.keys() >= {*cases}:
        prepare(chosen)
    totals = Totals.of(_results(cases, known, options.log))
    for kind, found in totals.outcomes.items():
        print(
            f"{kind:14}",
            dict(found),
            f"{totals.seconds[kind]:.1f} s, {totals.megabytes[kind]:.0f} MB",
        )
    content = {"cases": len(cases), "commit": options.commit, **vars(totals)}
    label = options.label if options.kinds else "readers"
    if label and parts == 1 and len(cases) >= 1000:
        recorded.save(recorded.RESULTS / f"fuzz_{label}.json", 2, torch.device("cpu"), content)
    sys.exit(bool(totals.faults))


if __name__ == "__main__":
    main()
