"""Measures memory and time of the FastCLIP family's per-sample state at 100 million samples.

    python benchmarks/sample_table.py --num-samples 100000000 --batch-size 4096

Reads the resident memory before and after the table is created and written in full. Writes
`sample_table.json` into benchmarks/results/.
"""

import argparse
import datetime
import json
import math
import platform
import resource
import statistics
import time
from pathlib import Path

import torch

from neuclip.method.sample_table import SampleTable
from neuclip.parallel.collectives import BatchLayout

RESULTS = Path(__file__).parent / "results"


def resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=100_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    available = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()
                         if line.startswith("MemAvailable"))) / 2**10  # fmt: skip
    needed = 2 * 4 * args.num_samples / 2**20
    if needed > 0.8 * available:
        raise SystemExit(f"the table needs {needed:,.0f} MB, {available:,.0f} MB are available")
    before = resident_mb()
    table = SampleTable(args.num_samples, (-math.inf, -math.inf))
    after = resident_mb()
    generator = torch.Generator().manual_seed(0)
    layout = BatchLayout((args.batch_size,), 0)
    reads, writes = [], []
    for _ in range(args.repeats):
        ids = torch.randint(args.num_samples, (args.batch_size,), generator=generator)
        begin = time.perf_counter()
        values = table.read(ids)
        middle = time.perf_counter()
        table.write(ids, values.clamp_min(-10.0), layout)
        reads.append(middle - begin)
        writes.append(time.perf_counter() - middle)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/sample_table.py --num-samples {args.num_samples} "
        f"--batch-size {args.batch_size}",
        "machine": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "table_mb": round(needed, 1),
        "resident_mb_added": round(after - before, 1),
        "bytes_per_sample": round((after - before) * 2**20 / args.num_samples, 2),
        "read_ms": round(statistics.median(reads) * 1e3, 3),
        "write_ms": round(statistics.median(writes) * 1e3, 3),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sample_table.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
