"""Measures search over given features: exact, and with an index, in milliseconds and recall.

    python benchmarks/search.py --images 100000
    python benchmarks/search.py --images 1000000 --queries 50

Features are drawn: 64 factors of falling variance and a little noise, without clusters, which is
harder for an index than photographs are. A text lies near its image but in a cone of its own, as
the texts of CLIP do. Recall is that of texts: the share of the 10 nearest images, by exact
comparison, that the index finds. Writes `search_<images>.json` into benchmarks/results/.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from given_features import write_store
from recorded import RESULTS, check_version, save

from neuclip.embedding.stored_images import StoredImages
from neuclip.search.approximate_search import ApproximateSearch, SampleQueries
from neuclip.search.exact_search import ExactSearch

VERSION = 1
FACTORS = 64


def drawn(images: int, dim: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of images, and of texts that describe some of them."""
    numbers = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape, dtype=np.float32)

    turned = normal(FACTORS, dim) / np.arange(1, FACTORS + 1, dtype=np.float32)[:, None] ** 0.5
    shared = 2 * normal(2, dim)  # the two cones
    rows = np.empty((images, dim), np.float32)
    for start in range(0, images, 65_536):
        part = rows[start : start + 65_536]
        part[:] = normal(len(part), FACTORS) @ turned + 0.3 * normal(len(part), dim) + shared[0]
    described = np.sort(numbers.choice(images, queries, replace=False))
    texts = rows[described] - shared[0] + 0.5 * normal(queries, FACTORS) @ turned + shared[1]
    for matrix in (rows, texts):
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return rows, texts


def milliseconds(search, queries: torch.Tensor, number: int) -> dict[str, float]:
    """Median and 95th percentile of the time of one query, one after another."""
    for query in queries[:5]:
        search.nearest(query, number)
    times = []
    for query in queries:
        begin = time.perf_counter()
        search.nearest(query, number)
        times.append(1000 * (time.perf_counter() - begin))
    return {f"p{share}_ms": round(float(np.percentile(times, share)), 1) for share in (50, 95)}


def measured_index(folder: Path, images: StoredImages, texts: np.ndarray, args) -> dict:
    """Time to build an index by one half of the texts, and speed and recall of the other half."""
    own = np.sort(np.random.default_rng(args.seed).choice(len(images), 400, replace=False))
    samples = [
        SampleQueries("texts", torch.from_numpy(texts)),
        SampleQueries("images", torch.from_numpy(images.features(own)), own),
    ]
    begin = time.perf_counter()
    index = ApproximateSearch.build(folder, images, samples)
    seconds = time.perf_counter() - begin
    record = index.record
    return {
        "build_s": round(seconds, 1),
        "index_mb": round((folder / "index.faiss").stat().st_size / 2**20, 1),
        "lists": record.lists,
        "probes": record.probes,
        "recall_at_10": record.recall,
        **milliseconds(index, samples[0].half(1).vectors, args.number),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--number", type=int, default=100, help="images to find")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = RESULTS / f"search_{args.images}.json"
    check_version(path, VERSION)
    torch.set_num_threads(args.threads)
    rows, texts = drawn(args.images, args.dim, args.queries, args.seed)
    queries = torch.from_numpy(texts)
    results = []
    with tempfile.TemporaryDirectory(prefix="neuclip-search-") as folder:
        for dtype in ("float32", "float16"):
            store = write_store(Path(folder) / dtype, rows.astype(dtype))
            begin = time.perf_counter()
            images = StoredImages.open(store)
            seconds = time.perf_counter() - begin
            found = milliseconds(ExactSearch(images), queries, args.number)
            results.append(
                {"search": "exact", "dtype": dtype, "open_s": round(seconds, 1), **found}
            )
            print(results[-1])
        with_index = measured_index(Path(folder) / "index", images, texts, args)
        results.append({"search": "index", "dtype": "float16", **with_index})
        print(results[-1])
    save(path, VERSION, torch.device("cpu"), {**vars(args), "results": results})


if __name__ == "__main__":
    main()
