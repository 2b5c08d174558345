"""Reading processes that die, stall, or find no room in shared memory."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from neuclip.data import reading
from neuclip.data.loader import (
    LoaderSettings,
    TrainLoader,
    evaluation_loader,
    evaluation_requests,
)
from neuclip.data.sources.shards import build_index
from neuclip.data.watchdog import Watchdog
from neuclip.errors import UserError


def transform(image):
    return pil_to_tensor(image) / 255


def tokenize(texts):
    return torch.zeros(len(texts), 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def index(tmp_path_factory, write_tar, pairs):
    folder = tmp_path_factory.mktemp("reading")
    return build_index([write_tar(folder / "0.tar", pairs(range(40)))])


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def train(index, work=lambda: None, **settings):
    """A loader whose reading processes do some work at each image."""

    def working(image):
        if multiprocessing.parent_process() is not None:
            work()
        return transform(image)

    return TrainLoader(index, working, tokenize, LoaderSettings(4, **settings))


def evaluation(index, work=lambda: None, workers=2, **settings):
    def working(image):
        work()
        return transform(image)

    requests = evaluation_requests(np.arange(len(index)), 4)
    return evaluation_loader(
        index, working, tokenize, requests, LoaderSettings(4, workers=workers, **settings)
    )


def end(number):
    return lambda: os.kill(os.getpid(), number)


ENDINGS = [
    (end(signal.SIGKILL), r"was killed \(SIGKILL\), .* memory ran out .*: lower --workers"),
    (end(signal.SIGSEGV), r"crashed \(SIGSEGV\), .* damaged image: `neuclip data inspect`"),
    (lambda: os._exit(3), r"ended with exit code 3; --workers 0"),
]


@pytest.mark.parametrize(
    ("start", "work", "message"), [(train, *each) for each in ENDINGS] + [(evaluation, *ENDINGS[0])]
)
def test_a_process_that_dies_is_named_at_once(index, start, work, message):
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"^reading process \d+ {message}") as caught:
        list(start(index, work, workers=2))
    assert "--resume auto" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 20


def test_a_death_waits_for_the_next_batch(index):
    """It never interrupts a step or a checkpoint."""
    batches = iter(train(index, workers=1))
    next(batches)
    (process,) = multiprocessing.active_children()
    process.kill()
    for _ in range(20):
        time.sleep(0.01)  # torch's own handler of SIGCHLD raises an error here
    with pytest.raises(UserError, match="was killed"):
        list(batches)


def test_the_end_of_other_children_is_no_failure(index):
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.2,))
    other.start()
    batches = train(index, lambda: time.sleep(0.05), workers=1)
    other.kill()
    assert len(list(batches)) == len(list(batches)) == 10


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stall_is_reported_and_ends(index, monkeypatch, caplog, stopped):
    monkeypatch.setattr("neuclip.data.loader.WORD_AFTER", 0.3)
    monkeypatch.setattr(reading.log, "propagate", True)
    work = end(signal.SIGSTOP) if stopped else lambda: time.sleep(60)
    with pytest.raises(UserError, match=r"no batch for \d+ s, the limit of --data-timeout") as got:
        list(train(index, work, workers=1, stall_limit=0.8))
    why = "are stopped" if stopped else "slow to read"
    assert why in str(got.value)
    assert 1 <= caplog.text.count("no batch for ") <= 2
    assert why in caplog.text
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []


def block_on_pipe():
    reading_end, _ = os.pipe()
    os.read(reading_end, 1)


def compute():
    while True:
        pass


@pytest.mark.parametrize("work", [lambda: time.sleep(60), block_on_pipe, compute])
def test_a_stall_without_reading_processes_is_reported_and_ends(index, monkeypatch, caplog, work):
    monkeypatch.setattr(reading, "WORD_AFTER", 0.2)
    monkeypatch.setattr(reading.log, "propagate", True)
    with pytest.raises(UserError, match=r"no batch for \d+ s, the limit .*\(--workers 0\)"):
        list(evaluation(index, work, workers=0, stall_limit=0.7))
    assert 1 <= caplog.text.count("no batch for ") <= 4
    assert len(list(evaluation(index, workers=0, stall_limit=0.7))) == 10  # the next one reads


def test_the_time_between_waits_does_not_count():
    told = []
    watchdog = Watchdog(told.append, every=0.02, limit=0.04)
    with watchdog.watching():
        time.sleep(0.2)
    assert told == []
    assert not watchdog.overdue


def test_slow_data_are_read_to_the_end(index, monkeypatch):
    monkeypatch.setattr("neuclip.data.loader.WORD_AFTER", 0.05)
    expected = [batch.keys for batch in train(index)]
    slow = train(index, lambda: time.sleep(0.02), workers=1)
    assert [batch.keys for batch in slow] == expected
    assert len(list(slow)) == len(expected)  # the processes live on


class Full(RuntimeError):
    """What torch raises: unable to allocate shared memory(shm): No space left on device."""


@pytest.mark.parametrize("room", [0, 1, 3])
def test_without_room_in_shared_memory_batches_are_the_same(index, monkeypatch, caplog, room):
    """None, a part of a batch, and some of the batches fit."""
    expected = list(train(index))
    share, left = torch.Tensor.share_memory_, [room]

    def full(tensor):
        if left[0] == 0:
            raise Full
        left[0] -= 1
        return share(tensor)

    def no_room(size):
        raise Full

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_room)
    monkeypatch.setattr(reading, "_reported_full", False)
    monkeypatch.setattr(reading.log, "propagate", True)
    found = list(train(index, workers=2))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert (one.keys, one.captions, one.damage) == (other.keys, other.captions, other.damage)
        one.images.add_(1)  # it can be written to
    assert caplog.text.count("--shm-size=8g or --ipc=host") == 1


def test_batches_are_written_where_they_are_passed(index, monkeypatch):
    """A reading process copies no images: they are in shared memory from the start."""
    found = []

    def passed(batch):
        found.append(batch.images.is_shared())
        assert all(found)
        return batch

    monkeypatch.setattr(reading, "_shared", passed)
    monkeypatch.setattr(torch.Tensor, "share_memory_", None)
    assert [batch.keys for batch in train(index, workers=2)] == [b.keys for b in train(index)]


def test_a_users_mistake_in_a_process_is_one_line(index, monkeypatch):
    def refuse(self, position, decode):
        raise UserError("column 'x' holds lists")

    monkeypatch.setattr(type(index), "read_with", refuse)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"^column 'x' holds lists$"):
            list(train(index, workers=workers))
