import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import pil_to_tensor

from neuclip.data import loader as loading
from neuclip.data.batch import Batch, Unreadable, _random_state_kept
from neuclip.data.captions import CaptionRule
from neuclip.data.damage import DamageLog
from neuclip.data.epoch_description import describe_epoch
from neuclip.data.loader import (
    LoaderSettings,
    TrainLoader,
    evaluation_loader,
    evaluation_requests,
)
from neuclip.data.order import Layout, draw, epoch_order
from neuclip.data.samples import Damage
from neuclip.data.sources.shards import build_index
from neuclip.errors import UserError


def transform(image):
    """A random one, by every source of chance that transforms draw from."""
    noise = torch.rand(3, 1, 1) + random.random() + np.random.random()
    return pil_to_tensor(image) / 255 + noise


def plain(image):
    return pil_to_tensor(image) / 255


def tokenize(texts):
    rows = [[ord(character) for character in text[:12]] for text in texts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def index(tmp_path_factory, write_tar, pairs):
    folder = tmp_path_factory.mktemp("good")
    shards = [write_tar(folder / f"{n}.tar", pairs(range(n * 14, n * 14 + 14))) for n in range(3)]
    return build_index(shards)


def loader(index, batch_size, seed=5, transform=transform, **more):
    return TrainLoader(index, transform, tokenize, LoaderSettings(batch_size, seed=seed, **more))


def content(batch):
    return (
        batch.images.tolist(),
        batch.tokens.tolist(),
        batch.sample_ids.tolist(),
        batch.keys,
        batch.captions,
        batch.damage,
    )


def judged(index, batch_size, workers=0):
    requests = evaluation_requests(np.arange(len(index)), batch_size)
    return evaluation_loader(index, plain, tokenize, requests, LoaderSettings(4, workers=workers))


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def contents(batches):
    return [content(batch) for batch in batches]


# --- the order


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 900), st.integers(0, 2**31), st.integers(0, 100))
def test_no_sample_repeats_before_all_have_come(samples, length, seed, epoch):
    order = epoch_order(samples, length, seed, epoch)
    assert len(order) == length
    for start in range(0, length, samples):
        part = order[start : start + samples]
        assert len(set(part.tolist())) == len(part)
        assert part.min() >= 0
        assert part.max() < samples


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order(50, 50, s, e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_order_is_the_same_everywhere():
    # A changed order would make runs resume with other data than they were started with.
    assert epoch_order(8, 12, 2026, 3).tolist() == [1, 6, 3, 7, 2, 0, 4, 5, 0, 6, 5, 7]
    assert draw(2026, 3, 7) == 2113454037736225881


def test_description_of_an_epoch():
    assert describe_epoch(Layout.of("x", [100]), 100, 32) == (
        "an epoch is 96 samples: 3 steps of 32; each epoch drops a different 4 of the 100 samples"
    )
    assert describe_epoch(Layout.of("x", [100]), 64, 32) == (
        "an epoch is 64 samples: 2 steps of 32; each epoch drops a different 36 of the 100 samples"
    )
    assert describe_epoch(Layout.of("x", [100]), 256, 32) == (
        "an epoch is 256 samples: 8 steps of 32; each of the 100 samples is visited 2 times, "
        "56 once more"
    )
    assert describe_epoch(Layout.of("x", [64]), 64, 32) == "an epoch is 64 samples: 2 steps of 32"


# --- batches


def test_a_batch_holds_what_the_shards_hold(index):
    for batch in loader(index, 8, transform=plain):
        assert batch.images.shape == (8, 3, 4, 4)
        assert batch.images.dtype == torch.float32
        numbers = [int(key) for key in batch.keys]
        assert batch.captions == [f"number {n}" for n in numbers]
        assert batch.sample_ids.tolist() == numbers
        assert torch.equal(batch.tokens, tokenize(batch.captions))
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == numbers
        assert batch.class_indices.tolist() == [-1] * 8
        assert batch.damage == ()


@settings(max_examples=25, deadline=None)
@given(world=st.sampled_from([1, 2, 3, 4, 6]), epoch=st.integers(0, 3), length=st.integers(12, 130))
def test_ranks_share_the_same_global_batches(index, world, epoch, length):
    together = loader(index, 12, num_samples=length)
    together.set_position(epoch, 0)
    ranks = [
        loader(index, 12 // world, num_samples=length, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.set_position(epoch, 0)
    assert {len(rank) for rank in ranks} == {together.steps_per_epoch} == {length // 12}
    seen = []
    for whole, *parts in zip(together, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert keys(parts) == whole.keys
        seen += whole.keys
    full_rounds = len(seen) // len(index)
    assert all(seen.count(key) in (full_rounds, full_rounds + 1) for key in set(seen))


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_hold_the_same_global_batches(index, world):
    whole = loader(index, 12)
    steps = list(whole)
    for rank in range(world):
        own = 12 // world
        parts = loader(index, 2, rank=rank, world_size=world, accum_freq=own // 2)
        assert len(parts) == parts.steps_per_epoch == len(whole) == 3
        parts.set_position(0, 1)
        batches = list(parts)
        assert [len(batch) for batch in batches] == [2] * own
        images = torch.cat([batch.images for batch in batches]).view(
            2, own, *steps[0].images.shape[1:]
        )
        for step, found in zip(steps[1:], images, strict=True):
            assert torch.equal(found, step.images[rank * own : (rank + 1) * own])


def test_epochs_differ_and_follow_each_other(index):
    train = loader(index, 8)
    first, second = contents(train), contents(train)
    assert [c[3] for c in first] != [c[3] for c in second]
    again = loader(index, 8)
    again.set_position(1, 0)
    assert contents(again) == second


def test_a_part_of_an_epoch_ends_where_it_is_told_to(index):
    whole, part = loader(index, 4), loader(index, 4)
    expected = contents(whole)
    part.set_position(0, 2, 5)
    assert contents(part) == expected[2:5]
    assert contents(part) == contents(whole)  # the next epoch, in full
    with pytest.raises(ValueError, match="no epoch 0, step 6"):
        part.set_position(0, 6, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_at_any_step(index, workers):
    whole = loader(index, 4)
    epochs = [contents(whole), contents(whole)]
    resumed = loader(index, 4, workers=workers)
    places = [(0, 0), (1, 3), (0, 7), (1, 10), (0, 1)]
    for epoch, step in places:
        resumed.set_position(epoch, step)
        assert contents(resumed) == epochs[epoch][step:]
    # Broken off in mid-epoch, with batches read ahead that must not come later.
    resumed.set_position(0, 2)
    for batch in resumed:
        assert content(batch) == epochs[0][2]
        break
    resumed.set_position(1, 5)
    assert contents(resumed) == epochs[1][5:]


def test_number_of_workers_changes_nothing(index):
    expected = contents(loader(index, 5))
    for workers in (1, 2):
        assert contents(loader(index, 5, workers=workers)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_random_numbers_alone(index, workers):
    # Python's own generator is tested apart: the tests' type checker draws from it.
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train = loader(index, 8, workers=workers)
    for _ in train:
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]


def test_random_numbers_of_transforms_are_their_own():
    random.seed(1)
    before = random.getstate()
    with _random_state_kept():
        random.random()
        assert random.getstate() != before
    assert random.getstate() == before


def blocks_read(train):
    """The shard (of 14 samples) of every sample, in order."""
    return [int(key) // 14 for batch in train for key in batch.keys]


def test_windows_of_a_loader(index, monkeypatch):
    assert len(set(blocks_read(loader(index, 7, window=1))[:14])) == 1
    assert len(set(blocks_read(loader(index, 7))[:14])) > 1
    # Too many samples to shuffle as one: some blocks at a time, unless everything is asked for.
    monkeypatch.setattr("neuclip.data.loader._LARGEST_SHUFFLE", 41)
    monkeypatch.setattr("neuclip.data.loader._LARGE_WINDOW", 1)
    assert len(set(blocks_read(loader(index, 7))[:14])) == 1
    assert len(set(blocks_read(loader(index, 7, window=0))[:14])) > 1


def test_source_learns_which_blocks_come_next(index, monkeypatch):
    told = []
    monkeypatch.setattr(index, "expect", told.append, raising=False)
    train = loader(index, 7, window=1)
    order = blocks_read(train)[::14]
    assert [blocks[0] for blocks in told] == order
    assert [blocks[1] for blocks in told[:-1]] == order[1:]
    train.set_position(1, 0)
    assert blocks_read(train)[0] == told[2][-1] == told[3][0]


def test_positions_outside_an_epoch(index):
    train = loader(index, 8)
    for position in ((-1, 0), (0, -1), (0, 6)):
        with pytest.raises(ValueError, match="5 steps"):
            train.set_position(*position)
    train.set_position(0, 5)
    assert list(train) == []


@pytest.mark.parametrize("num_samples", [None, 40])
def test_fewer_samples_than_one_global_batch(index, num_samples):
    with pytest.raises(UserError, match=r"less than one global batch of 60 \(30 x 2 processes\)"):
        loader(index, 30, world_size=2, num_samples=num_samples)


def test_captions_are_tokenized_once(index):
    asked = []

    def counting(texts):
        asked.extend(texts)
        return tokenize(texts)

    train = TrainLoader(index, plain, counting, LoaderSettings(7))
    for _ in range(3):
        for batch in train:
            assert torch.equal(batch.tokens, tokenize(batch.captions))
    assert len(asked) == len(set(asked)) == 42


def test_remembered_captions_are_bounded(index, monkeypatch):
    monkeypatch.setattr("neuclip.data.batch._CACHED_CAPTIONS", 10)
    train = loader(index, 7)
    for _ in range(2):
        for batch in train:
            assert torch.equal(batch.tokens, tokenize(batch.captions))
    reader = train._reading._batches.dataset.reader
    assert len(reader._cached_tokens) <= 10


# --- several captions


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, write_tar, picture):
    """Sample n has n captions; sample 0 has none."""
    members = [
        (f"{n}.{ending}", content)
        for n in range(4)
        for ending, content in (
            ("png", picture(n)),
            ("json", json.dumps({"captions": [f"{n} {k}" for k in range(n)]}).encode()),
        )
    ]
    shard = write_tar(tmp_path_factory.mktemp("captioned") / "0.tar", members)
    return build_index([shard], captions=CaptionRule(("captions",), required=False))


def drawn(index, epochs=1, **more):
    """The captions that each sample is visited with."""
    visits = defaultdict(list)
    train = loader(index, 2, num_samples=40, **more)
    for _ in range(epochs):
        for batch in train:
            for key, caption in zip(batch.keys, batch.captions, strict=True):
                visits[key].append(caption)
    return visits


def test_each_visit_draws_one_of_several_captions(captioned):
    visits = drawn(captioned, epochs=4)
    assert {key: set(captions) for key, captions in visits.items()} == {
        "0": {""},
        "1": {"1 0"},
        "2": {"2 0", "2 1"},
        "3": {"3 0", "3 1", "3 2"},
    }
    assert len(set(visits["3"][:10])) > 1  # visits of one epoch differ too


def test_the_draw_depends_on_the_seed_but_not_on_workers_or_ranks(captioned):
    expected = drawn(captioned)
    assert drawn(captioned) == drawn(captioned, workers=1) == expected
    assert drawn(captioned, seed=6) != expected
    halves = [drawn(captioned, rank=rank, world_size=2) for rank in range(2)]
    assert {key: sorted(halves[0][key] + halves[1][key]) for key in expected} == {
        key: sorted(captions) for key, captions in expected.items()
    }


def test_the_first_caption_on_request(captioned):
    assert set(drawn(captioned, caption_choice="first")["3"]) == {"3 0"}


def test_all_captions_with_their_samples(captioned):
    def read(positions):
        requests = evaluation_requests(np.array(positions), 4, "all")
        (batch,) = evaluation_loader(captioned, plain, tokenize, requests, LoaderSettings(4))
        return batch

    batch = read([0, 2, 1])
    assert batch.keys == ["0", "2", "1"] and batch.captions == ["2 0", "2 1", "1 0"]
    assert batch.caption_owners == (1, 1, 2)
    assert batch.tokens.tolist() == tokenize(batch.captions).tolist()
    assert read([0]).tokens.shape == (0, 12)


# --- damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, write_tar, pairs, picture):
    members = [*pairs(range(20)), ("bad.png", b"x"), ("bad.txt", b"x"), ("mute.png", picture(1))]
    return build_index([write_tar(tmp_path_factory.mktemp("bad") / "0.tar", members)])


def test_corrupt_samples_are_replaced_and_named(damaged):
    expected = contents(loader(damaged, 22))
    assert contents(loader(damaged, 22, workers=1)) == expected
    (batch,) = loader(damaged, 22)
    assert len(batch) == 22
    assert sorted((d.key, d.kind) for d in batch.damage)[:2] == [
        ("bad", "image"),
        ("mute", "caption_missing"),
    ]
    assert set(batch.keys) == {f"{n:06d}" for n in range(20)}
    assert batch.sample_ids.tolist() == [int(key) for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_nothing_but_damage_ends_with_a_message(tmp_path, write_tar, workers):
    members = [(f"{n}.{extension}", b"x") for n in range(9) for extension in ("png", "txt")]
    index = build_index([write_tar(tmp_path / "0.tar", members)])
    with pytest.raises(UserError, match=r"none of 20 samples tried could be read:\n.*0\.tar"):
        list(loader(index, 3, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_names_what_is_in_batches_that_are_lost(tmp_path, write_tar, workers):
    members = [(f"{n}.{extension}", b"x") for n in range(9) for extension in ("png", "txt")]
    index = build_index([write_tar(tmp_path / "0.tar", members)])
    found = list(judged(index, 2, workers))
    assert [type(each) for each in found] == [Unreadable] * 5
    assert [d.key for each in found for d in each.damage] == [str(n) for n in range(9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_all_in_order(index, workers):
    batches = list(judged(index, 16, workers))
    assert [len(batch) for batch in batches] == [16, 16, 10]
    assert keys(batches) == [f"{n:06d}" for n in range(42)]


def test_evaluation_reads_the_samples_and_batches_asked_for(index):
    requests = evaluation_requests(np.array([3, 1, 4, 15, 9]), 2)
    batches = list(
        evaluation_loader(index, plain, tokenize, requests[1:], LoaderSettings(4, workers=1))
    )
    assert [batch.sample_ids.tolist() for batch in batches] == [[4, 15], [9]]
    assert list(evaluation_loader(index, plain, tokenize, [], LoaderSettings(4, workers=2))) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_evaluation_leaves_damage_out_and_names_it(damaged, batch_size):
    found = list(judged(damaged, batch_size))
    batches = [each for each in found if isinstance(each, Batch)]
    assert keys(batches) == [f"{n:06d}" for n in range(20)]
    assert [d.key for each in found for d in each.damage] == ["bad", "mute"]


def test_damage_log(tmp_path):
    log = DamageLog()
    log.check(0, 100)
    bad = Damage("a.tar", "1", "image", "no picture")
    assert log.add([bad, bad, Damage("b.tar", "", "shard", "cut")]) == [
        bad,
        Damage("b.tar", "", "shard", "cut"),
    ]
    report = log.report()
    assert report["total"] == log.total == 3
    assert report["by_kind"] == {"image": 2, "shard": 1}
    assert report["by_shard"] == {"a.tar": 2, "b.tar": 1}
    assert [example["key"] for example in report["examples"]] == ["1", ""]
    assert DamageLog.from_report(report).report() == report
    assert log.summary() == "2 image, 1 shard"


def test_damage_log_stops_a_run():
    log = DamageLog()
    log.add([Damage("a.tar", "1", "image", "no picture")])
    log.check(0.01, 8)  # one in the first batch is no verdict
    with pytest.raises(UserError, match=r"1 of 8 samples read are corrupt.*Worst: a\.tar \(1\)"):
        log.check(0, 8)
    log.add([Damage("b.tar", str(n), "image", "no picture") for n in range(60)])
    log.check(0.01, 10_000)
    with pytest.raises(UserError, match=r"Worst: b\.tar \(60\), a\.tar \(1\)"):
        log.check(0.01, 1000)


def test_damage_log_keeps_a_bounded_number_of_examples():
    log = DamageLog()
    log.add(Damage("a.tar", str(n), "image", "no picture") for n in range(10_500))
    assert len(log.report()["examples"]) == 10_000
    assert log.total == 10_500


# --- processes

_SCRIPT = """
import sys, time
from pathlib import Path
import signal
import torch
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.sources.shards import build_index

def transform(image):
    return torch.zeros(3, 4, 4)

def tokenize(texts):
    return torch.zeros(len(texts), 4, dtype=torch.int64)

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
index = build_index([Path(sys.argv[1])])
loader = TrainLoader(index, transform, tokenize, LoaderSettings(2, workers=2))
batches = iter(loader)
next(batches)
print("ready", flush=True)
sys.stdin.readline()
left = sum(1 for _ in batches)
again = 0
for _ in loader:
    again += 1
    break
print(left, again, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_group_and_end_with_the_parent(
    tmp_path, write_tar, pairs, number
):
    shard = write_tar(tmp_path / "0.tar", pairs(range(40)))
    command = [sys.executable, "-c", _SCRIPT, str(shard)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            os.killpg(process.pid, number)
            time.sleep(0.2)
            # It ends with a loader still in mid-epoch: workers must go when Python tells them to.
            output, _ = process.communicate("go\n", timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert output == "19 1\n"
    assert process.returncode == 0


def test_a_reading_process_without_a_thread_to_spare_ends_with_sigterm(monkeypatch):
    """The thread that waits for SIGTERM cannot start where `ulimit -u` is too small."""
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    try:
        loading._ignore_signals()
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
