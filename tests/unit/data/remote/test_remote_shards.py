"""Remote shards: a server that breaks, a cache that is bounded, an order that stays exact."""

import hashlib
import multiprocessing
import os
import pickle
import random
import shlex
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.opening import open_source
from neuclip.data.remote.cache import NoRoomError, RemoteShard, ShardCache
from neuclip.data.remote.fetch import Expected, RetryPolicy, fetch, fetch_text
from neuclip.data.remote.manifest import ShardEntry, manifest_text, parse_manifest
from neuclip.data.remote.prefetch import Prefetcher
from neuclip.data.remote.transport import FetchError, open_url
from neuclip.data.samples import SampleError
from neuclip.data.sources.shards import build_index
from neuclip.errors import UserError
from shard_server import serving

QUICK = RetryPolicy(attempts=3, timeout=1.0, pause=0.01, longest_pause=0.02)
PATIENT = RetryPolicy(attempts=3, timeout=20.0, pause=0.01, longest_pause=0.02)  # no stall intended
SAMPLES, SHARDS = 6, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_tar, pairs):
    """A folder of 8 shards of 6 samples, without indexes beside."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(SHARDS):
        first = number * SAMPLES
        write_tar(folder / f"{number}.tar", pairs(range(first, first + SAMPLES)))
    return folder


@pytest.fixture
def server(shards):
    with serving(shards) as server:
        yield server


@pytest.fixture
def opened(server, tmp_path):
    """Opens `{0..7}.tar` of the server, or something else, and closes it at the end."""
    sources = []

    def open_(spec=None, size=1.0, **more):
        retry = more.pop("retry", PATIENT)
        more.setdefault("shuffle_window", 2)
        reading = ReadingConfig(cache_dir=str(tmp_path / "cache"), cache_size_gb=size, **more)
        spec = spec or f"{server.url}/{{0..7}}.tar"
        sources.append(open_source(spec, reading, retry=retry))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


def manifest_of(folder, **changes):
    entries = []
    for path in sorted(folder.glob("*.tar")):
        content = path.read_bytes()
        entry = ShardEntry(path.name, len(content), hashlib.sha256(content).hexdigest(), SAMPLES)
        entries.append(replace(entry, **changes))
    return manifest_text(entries)


@pytest.fixture
def with_manifest(server, shards):
    (shards / "manifest.json").write_text(manifest_of(shards))
    yield
    (shards / "manifest.json").unlink()


def captions(source):
    return [source.read(n).caption for n in range(len(source))]


EXPECTED = [f"number {n}" for n in range(SAMPLES * SHARDS)]


def shard_size(shards):
    return (shards / "0.tar").stat().st_size


def cached(tmp_path):
    return sorted(path.name.split("-")[1] for path in (tmp_path / "cache").glob("*.tar"))


# --- fetching one file


@pytest.fixture
def partial(tmp_path):
    return tmp_path / "file.partial"


@pytest.fixture
def big(shards, server):
    content = np.random.default_rng(0).bytes(3_000_000)
    (shards / "big.bin").write_bytes(content)
    return content


def test_downloads_the_full_file(server, big, partial):
    sizes = []
    digest = fetch(f"{server.url}/big.bin", partial, Expected(), QUICK, sizes.append)
    assert partial.read_bytes() == big
    assert digest == hashlib.sha256(big).hexdigest()
    assert sizes == [len(big)]


@pytest.mark.parametrize(
    "faults",
    [
        [503, 500, ("cut", 1_000_000), 429, ("stall", 2.5, 1_500_000)],
        [("cut", 0), ("cut", 10)],
        [("stall", 2.5, 0)],
        # More failures than attempts, with bytes between them: it goes on.
        [("cut", 500_000)] * 5,
    ],
)
def test_recovers_and_goes_on_from_where_it_broke_off(server, big, partial, faults):
    server.faults["big.bin"] = list(faults)
    fetch(f"{server.url}/big.bin", partial, Expected(), QUICK)
    assert partial.read_bytes() == big
    got = sum(fault[-1] for fault in faults if isinstance(fault, tuple))
    asked = [int(text.strip("bytes=-")) for text in server.ranges_asked("big.bin")]
    assert asked == sorted(asked)
    assert max(asked, default=0) == got


def test_a_later_process_goes_on_too(server, big, partial):
    server.faults["big.bin"] = [("cut", 1_000_000), 503, 503, 503]
    with pytest.raises(FetchError, match=r"HTTP 503 .*\(3 attempts\)"):
        fetch(f"{server.url}/big.bin", partial, Expected(), QUICK)
    assert partial.stat().st_size == 1_000_000
    fetch(f"{server.url}/big.bin", partial, Expected(), QUICK)
    assert partial.read_bytes() == big
    assert server.ranges_asked("big.bin")[-1] == "bytes=1000000-"


@pytest.mark.parametrize("how", ["changed", "no ranges", "no tags"])
def test_begins_again_where_going_on_would_mix_two_files(server, shards, big, partial, how):
    server.etags = how != "no tags"
    server.faults["big.bin"] = [("cut", 1_000_000), 503, 503, 503]
    with pytest.raises(FetchError):
        fetch(f"{server.url}/big.bin", partial, Expected(), QUICK)
    server.ranges = how != "no ranges"
    other = big if how == "no ranges" else big[::-1]
    (shards / "big.bin").write_bytes(other)
    fetch(f"{server.url}/big.bin", partial, Expected(), QUICK)
    assert partial.read_bytes() == other


def test_checksum_finds_what_the_length_does_not(server, big, partial):
    expected = Expected(len(big), hashlib.sha256(big).hexdigest())
    server.faults["big.bin"] = [("garbage",)]
    fetch(f"{server.url}/big.bin", partial, expected, QUICK)
    assert partial.read_bytes() == big
    server.faults["big.bin"] = [("garbage",)] * 3
    partial.unlink()
    with pytest.raises(FetchError, match=r"SHA-256 is .* instead of"):
        fetch(f"{server.url}/big.bin", partial, expected, QUICK)


def test_gone_is_gone_at_once(server, partial):
    with pytest.raises(FetchError, match=r"^HTTP 404 Not Found$"):
        fetch(f"{server.url}/none.bin", partial, Expected(), QUICK)
    assert server.count("none.bin") == 1


@contextmanager
def answering(answer):
    """A server whose answers are made by a function of the request's handler."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def log_message(self, *_):
            pass

        def do_GET(self):
            Handler.asked += 1
            with suppress(ConnectionError):
                answer(self)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/x.tar", Handler
    finally:
        http.shutdown()
        http.server_close()


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(2000):
        handler.wfile.write(b"x" * 2**16)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def one_more_byte(handler):
    """A range that holds one byte of many, each time."""
    start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{start}/1000000")
    else:
        handler.send_header("Content-Length", "1000000")
    handler.send_header("ETag", '"same"')
    handler.end_headers()
    handler.wfile.write(b"x")
    handler.close_connection = True


def always_416(handler):
    handler.send_error(416)


def announced(size):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", size)
        handler.end_headers()
        handler.wfile.write(b"x")

    return answer


def redirected(handler):
    handler.send_response(302)
    handler.send_header("Location", "ftp://127.0.0.1:1/x.tar")
    handler.end_headers()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (endless, r"more than --cache-size-gb \(1,000,000\)"),
        (trickle, "too slow"),
        (one_more_byte, "too slow"),
        (always_416, "HTTP 416"),
        (announced("1" + "0" * 15), r"more than --cache-size-gb \(1,000,000\)"),
        (redirected, "unknown url type: ftp"),
    ],
)
def test_a_hostile_server_is_left(answer, words, partial):
    retry = RetryPolicy(attempts=3, timeout=1, pause=0.01, longest_pause=0.02, patience=0.5)
    partial.write_bytes(b"earlier")
    with answering(answer) as (url, handler), pytest.raises(FetchError, match=words):
        fetch(url, partial, Expected(), retry, most=1_000_000)
    assert handler.asked < 200
    assert not partial.exists() or partial.stat().st_size <= 1_000_000


def test_a_claimed_size_evicts_nothing(server, shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * shard_size(shards), QUICK)
    cache.lease(RemoteShard(f"{server.url}/0.tar")).release()
    with (
        answering(announced("1" + "0" * 15)) as (url, _),
        pytest.raises(FetchError, match="more than --cache-size-gb"),
    ):
        cache.lease(RemoteShard(url))
    assert cached(tmp_path) == ["0.tar"]


def test_a_manifest_without_end_is_none(monkeypatch):
    monkeypatch.setattr("neuclip.data.remote.fetch._LARGEST_TEXT", 10**6)
    with answering(endless) as (url, _):
        assert fetch_text(url, QUICK) is None


def test_no_server_at_all(partial):
    with pytest.raises(FetchError, match="refused"):
        fetch("http://127.0.0.1:9/x.tar", partial, Expected(), QUICK)


# --- shards as a source


@pytest.mark.parametrize("limit", [1.0, 90_000 / 2**30])
def test_reads_as_local_shards_do(opened, server, shards, tmp_path, limit):
    source = opened(size=limit)
    assert captions(source) == EXPECTED
    local = build_index([shards / f"{n}.tar" for n in range(SHARDS)])
    for position in (0, 13, 47):
        here, there = local.read(position), source.read(position)
        assert (here.key, here.image.tobytes()) == (there.key, there.image.tobytes())
    url = f"{server.url}/2.tar"
    assert source.locate(13) == (url, "000013")
    assert source.sample_id(13) == 13


def test_counted_once(opened, server):
    opened()
    before = server.count("3.tar")
    assert before == 1
    assert captions(opened()) == EXPECTED
    assert server.count("3.tar") == before


def test_members_that_are_not_read_are_counted(opened, server, shards, write_tar, pairs):
    write_tar(shards / "extra.tar", [*pairs(range(2)), ("0.flac", b"")])
    lines = ("1 of 5 members, unknown ending (.flac)",)
    assert opened(f"{server.url}/extra.tar").unused == lines
    assert opened(f"{server.url}/extra.tar").unused == lines  # from the record in the cache
    (shards / "extra.tar").unlink()


def test_manifest_saves_counting(opened, server, with_manifest):
    source = opened()
    assert len(source) == SAMPLES * SHARDS
    assert all(server.count(f"{n}.tar") == 0 for n in range(SHARDS))
    assert source.read(13).caption == "number 13"
    assert [server.count(f"{n}.tar") for n in range(4)] == [0, 0, 1, 0]


def test_manifest_outlives_the_network(opened, server, with_manifest):
    opened()
    server.faults["manifest.json"] = [503] * 3
    assert len(opened()) == SAMPLES * SHARDS
    assert server.count("0.tar") == 0


def test_manifest_that_is_none(opened, server, shards):
    (shards / "manifest.json").write_text('{"version": 2}')
    try:
        with pytest.raises(UserError, match=r"manifest\.json: version 2, not 1"):
            opened()
    finally:
        (shards / "manifest.json").unlink()


def test_manifest_of_other_shards_is_damage(opened, server, shards):
    (shards / "manifest.json").write_text(manifest_of(shards, samples=5))
    try:
        source = opened()
        with pytest.raises(SampleError) as error:
            source.read(0)
    finally:
        (shards / "manifest.json").unlink()
    assert error.value.damage.kind == "shard_changed"
    assert "6 samples instead of the 5" in error.value.damage.detail


@pytest.mark.parametrize("kind", ["manifest", "counted"])
def test_unreachable_shard_is_damage(opened, server, shards, kind):
    server.faults["2.tar"] = [503] * 50
    if kind == "manifest":
        (shards / "manifest.json").write_text(manifest_of(shards))
    try:
        source = opened()
    finally:
        (shards / "manifest.json").unlink(missing_ok=True)
    if kind == "counted":
        assert len(source) == SAMPLES * (SHARDS - 1)
        (damage,) = source.damage
    else:
        for position in (12, 17):
            with pytest.raises(SampleError) as error:
                source.read(position)
        damage = error.value.damage
        assert source.read(18).caption == "number 18"
    # Not once for each sample: the failure is remembered.
    assert server.count("2.tar") == QUICK.attempts
    assert (damage.shard, damage.kind) == (f"{server.url}/2.tar", "shard")
    assert damage.detail == "not reachable: HTTP 503 Service Unavailable (3 attempts)"


def test_training_goes_on_without_an_unreachable_shard(opened, server, with_manifest):
    server.faults["2.tar"] = [503] * 50
    batches = list(train(opened(), 8))
    assert len(batches) == 6
    lost = [damage for batch in batches for damage in batch.damage]
    assert {damage.kind for damage in lost} == {"shard"}
    assert len(lost) >= SAMPLES
    seen = {caption for batch in batches for caption in batch.captions}
    assert seen.isdisjoint(EXPECTED[12:18])


def test_damage_inside_a_shard_has_the_address(opened, server, shards, write_tar, pairs):
    write_tar(shards / "bad.tar", [*pairs([0]), ("x.png", b"no picture"), ("x.txt", b"x")])
    source = opened(f"{server.url}/bad.tar")
    with pytest.raises(SampleError) as error:
        source.read(1)
    assert error.value.damage.shard == f"{server.url}/bad.tar"
    assert error.value.damage.kind == "image"


def test_a_new_run_tries_again(opened, server, monkeypatch):
    server.faults["2.tar"] = [503] * QUICK.attempts
    assert len(opened(f"{server.url}/{{1..2}}.tar")) == SAMPLES
    assert len(opened(f"{server.url}/{{1..2}}.tar")) == SAMPLES  # another process of the same run
    assert server.count("2.tar") == QUICK.attempts
    monkeypatch.setattr("neuclip.data.remote.remote_shards._SAME_START", 0.0)
    assert len(opened(f"{server.url}/{{1..2}}.tar")) == 2 * SAMPLES


def test_nothing_can_be_had(opened, server):
    with pytest.raises(UserError, match=r"no samples in 2 remote shard.*\n.*HTTP 404"):
        opened(f"{server.url}/none{{0..1}}.tar")


def test_keys_as_ids(opened):
    source = opened(data_size=48)
    assert [source.sample_id(n) for n in (0, 47)] == [0, 47]


@pytest.mark.parametrize(
    ("window", "number", "words"),
    [
        (1, 1.5, "is too small"),
        (2, 1.5, "is too small"),
        (0, 1.5, "is too small"),
        (1, 0.5, "bytes, more than --cache-size-gb"),  # not even one shard fits
    ],
)
def test_cache_that_is_too_small(opened, shards, window, number, words):
    with pytest.raises(UserError, match=words):
        opened(size=number * shard_size(shards) / 2**30, shuffle_window=window)


def test_fsspec(opened, shards):
    assert captions(opened(f"file://{shards}/{{0..7}}.tar")) == EXPECTED


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://x/0.tar",
        "dropbox://x/0.tar",
        "ftp://x/0.tar",
        "zip://x/0.tar",
        "reference://x/0.tar",
    ],
)
def test_addresses_that_nothing_opens(opened, url):
    with pytest.raises(UserError, match=r"x/0\.tar"):
        opened(url)


# --- commands


def test_pipe_needs_to_be_allowed(opened, shards):
    with pytest.raises(UserError, match="--allow-pipe"):
        opened(f"pipe:cat {shards}/0.tar")


@pytest.mark.parametrize(
    "pattern", ["{{{pipe},http://h/a.tar}}", "{{http://h/{{a,b}}.tar,{pipe}}}", "{{x,{pipe} #://}}"]
)
def test_a_pattern_makes_no_command(opened, tmp_path, pattern):
    with pytest.raises(UserError, match=r"--allow-pipe|unknown scheme|no such|does not exist"):
        opened(pattern.format(pipe=f"pipe:touch {tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_pipe(opened, shards):
    command = f"pipe:cat {shlex.quote(str(shards))}/{{0..7}}.tar"
    assert captions(opened(command, allow_pipe=True)) == EXPECTED


def test_failing_pipe_gives_the_reason(opened, shards, tmp_path):
    flag = tmp_path / "fails"
    failing = "echo first >&2; echo last >&2; exit 3"
    spec = f"pipe:if [ -e {flag} ]; then {failing}; fi; cat {shards}/0.tar"
    assert len(opened(spec, allow_pipe=True)) == SAMPLES
    flag.touch()
    for path in (tmp_path / "cache").glob("*"):
        if path.is_file():
            path.unlink()
    source = opened(spec, allow_pipe=True)
    with pytest.raises(SampleError) as error:
        source.read(0)
    assert error.value.damage.detail == "not reachable: exit code 3: last (3 attempts)"


# --- the cache


def test_cache_is_bounded_and_spares_what_is_read(server, shards, tmp_path):
    size = (shards / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 3 * size, PATIENT)
    all_shards = [RemoteShard(f"{server.url}/{n}.tar") for n in range(SHARDS)]
    first = cache.lease(all_shards[0])
    for shard in all_shards[1:]:
        cache.lease(shard).release()
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 3 * size
    assert cached(tmp_path) == ["0.tar", "6.tar", "7.tar"]
    first.release()
    cache.lease(all_shards[1]).release()
    assert "0.tar" not in cached(tmp_path)


def test_what_is_read_now_may_exceed_the_bound_but_nothing_ahead(server, shards, tmp_path):
    size = (shards / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * size, PATIENT)
    all_shards = [RemoteShard(f"{server.url}/{n}.tar") for n in range(4)]
    leases = [cache.lease(shard) for shard in all_shards[:2]]
    with pytest.raises(NoRoomError):
        cache.fetch(all_shards[2], ahead_of=())
    leases.append(cache.lease(all_shards[2]))
    assert len(cached(tmp_path)) == 3
    del leases


def test_shard_in_use_by_another_process_is_spared(server, shards, tmp_path):
    size = (shards / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", size, PATIENT)
    shard, other = (RemoteShard(f"{server.url}/{n}.tar") for n in range(2))
    cache.lease(shard).release()
    script = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(cache.path(shard))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        cache.lease(other).release()
        assert cache.path(shard).exists()
        process.communicate("")
    cache.lease(RemoteShard(f"{server.url}/2.tar")).release()
    assert not cache.path(shard).exists()


def _read_at_random(cache, shards, seed):
    """What one of several processes does: leases shards and looks at all of their bytes."""
    chance = random.Random(seed)
    held = []
    for _ in range(40):
        shard = chance.choice(shards)
        lease = cache.lease(shard)
        if hashlib.sha256(lease.path.read_bytes()).hexdigest() != shard.expected.sha256:
            os._exit(1)
        held = [*held[-1:], lease]
        if chance.random() < 0.2:
            with suppress(NoRoomError):
                cache.fetch(chance.choice(shards), ahead_of=())
    os._exit(0)


def test_processes_share_a_cache_that_is_far_too_small(server, shards, tmp_path):
    known = []
    for number in range(SHARDS):
        content = (shards / f"{number}.tar").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        known.append(RemoteShard(f"{server.url}/{number}.tar", Expected(len(content), digest)))
    cache = ShardCache(tmp_path / "cache", 3 * len(content), PATIENT)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_read_at_random, args=(cache, known, seed)) for seed in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert not list(cache.folder.glob("*.partial*"))
    # All processes are gone, and their locks with them: the next that is fetched finds room.
    cache.path(known[0]).unlink(missing_ok=True)
    cache.lease(known[0]).release()
    assert len(cached(tmp_path)) <= 3


def test_open_files_are_bounded(opened, with_manifest):
    source = opened(shuffle_window=2)
    before = len(list(Path("/dev/fd").iterdir()))
    assert captions(source) == EXPECTED
    assert len(list(Path("/dev/fd").iterdir())) <= before + 2 * 2
    source.close()
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_travels_to_other_processes(opened, with_manifest):
    source = pickle.loads(pickle.dumps(opened()))
    assert captions(source) == EXPECTED
    source.close()


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    cache = ShardCache(tmp_path / "cache", 10**6, PATIENT)
    with pytest.raises(UserError, match=r"--cache-dir .* is not writable"):
        cache.lease(RemoteShard(f"{server.url}/0.tar"))


def test_index_of_a_shard_fetched_again(opened, server, shards, tmp_path, write_tar, pairs):
    """The same bytes need no new scan; other bytes of the same length must not use the old one."""
    write_tar(shards / "again.tar", pairs([1, 2]))
    cache = ShardCache(tmp_path / "cache", 10**6, PATIENT)
    shard = RemoteShard(f"{server.url}/again.tar")
    times = []
    for numbers in ([1, 2], [1, 2], [3, 4]):
        write_tar(shards / "again.tar", pairs(numbers))
        cache.lease(shard).release()
        times.append(cache.path(shard).stat().st_mtime_ns)
        index = build_index([cache.path(shard)])
        assert index.read(1).caption == f"number {numbers[1]}"
        cache.path(shard).unlink()
    assert times[0] == times[1] != times[2]


# --- order, prefetch, resume


def transform(image):
    return torch.tensor(image.getpixel((0, 0))).view(3, 1, 1) / 255


def tokenize(texts):
    return torch.tensor([[int(text.split()[1])] for text in texts])


def train(source, batch_size, **more):
    return TrainLoader(source, transform, tokenize, LoaderSettings(batch_size, seed=3, **more))


def keys(batches):
    return [batch.keys for batch in batches]


def test_next_window_is_fetched_ahead(opened, server, with_manifest, tmp_path):
    source = opened(shuffle_window=2)
    batches = iter(train(source, 4))
    next(batches)
    deadline = time.time() + 30
    while len(cached(tmp_path)) < 4 and time.time() < deadline:
        time.sleep(0.02)
    assert len(cached(tmp_path)) == 4  # this window and the next, and no more
    assert sum(server.count(f"{n}.tar") for n in range(SHARDS)) == 4  # each of them once
    rest = list(batches)
    assert len(rest) == 11
    assert max(server.count(f"{n}.tar") for n in range(SHARDS)) == 1


def test_training_while_everything_breaks(opened, server, shards, with_manifest):
    expected = keys(train(build_index([shards / f"{n}.tar" for n in range(8)]), 4, window=2))
    for number in range(SHARDS):
        server.faults[f"{number}.tar"] = [
            [503, ("cut", 3000)], [("garbage",)], [("stall", 0.5, 2000)], [("cut", 100), 500]
        ][number % 4]  # fmt: skip
    source = opened(shuffle_window=2, size=90_000 / 2**30)
    batches = list(train(source, 4, workers=2))
    assert keys(batches) == expected
    assert not any(batch.damage for batch in batches)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    window=st.integers(0, 9),
    workers=st.sampled_from([0, 1, 2]),
    world=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 5),
)
def test_resume_is_exact(opened, with_manifest, window, workers, world, step):
    whole = train(opened(shuffle_window=window), 8, window=window)
    epochs = [keys(whole), keys(whole)]
    ranks = [
        train(
            opened(shuffle_window=window),
            8 // world,
            window=window,
            rank=rank,
            world_size=world,
            workers=workers,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.set_position(1, step)
    parts = [keys(rank) for rank in ranks]
    together = [list(chain.from_iterable(batches)) for batches in zip(*parts, strict=True)]
    assert together == epochs[1][step:]


@pytest.mark.parametrize("address", ["http://[/0.tar", "http://[::1/0.tar", "https://a]/0.tar"])
def test_what_is_no_address_fails_for_good(address):
    with pytest.raises(FetchError, match="not an address"):
        open_url(address, 0, None, 1.0)


def test_manifest_text_and_back():
    entries = [ShardEntry("0.tar", 10_240, "ab", 3), ShardEntry("1.tar", 11_264, "cd", 4)]
    assert parse_manifest(manifest_text(entries)) == {entry.name: entry for entry in entries}
    for wrong in ("[]", "{}", '{"version": 1, "shards": [{"name": 1}]}', "x"):
        with pytest.raises(ValueError):
            parse_manifest(wrong)


def test_background_process_ends_with_its_parent(server, shards, tmp_path):
    (shards / "manifest.json").write_text(manifest_of(shards))
    script = f"""
import sys
from neuclip.config.data_sections import ReadingConfig
from neuclip.data.opening import open_source
source = open_source({server.url + "/{0..7}.tar"!r}, ReadingConfig(cache_dir={str(tmp_path)!r}))
source.expect([0])
print(source._prefetcher._process.pid, flush=True)
import os; os._exit(0)
"""
    try:
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    finally:
        (shards / "manifest.json").unlink()
    pid = int(done.stdout)
    deadline = time.time() + 30
    while _alive(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except OSError:
        os.kill(pid, 0)
        return True
    return state != "Z"


def test_a_file_of_the_working_folder_is_not_imported(tmp_path, monkeypatch, server, shards):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as `python -m` has it
    cache = ShardCache(tmp_path / "cache", 2**30, QUICK)
    prefetcher = Prefetcher(cache, [RemoteShard(f"{server.url}/0.tar")])
    prefetcher.want([0])
    try:
        for _ in range(600):
            if cached(tmp_path) == ["0.tar"]:
                break
            time.sleep(0.1)
        assert cached(tmp_path) == ["0.tar"]
    finally:
        prefetcher.close()
    assert not (tmp_path / "run").exists()
