from itertools import count

import pytest
import torch

from neuclip.cli.app import main
from neuclip.data.decode import decode_image
from neuclip.data.sources.shards import build_index
from neuclip.data.tools.bench import STAGES, Speed, Stages, bench
from neuclip.errors import UserError


class Clock:
    """Each stage takes its own time, by decree."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds, function):
        def slow(*arguments):
            self.now += seconds
            return function(*arguments)

        return slow


def stages(clock, seconds):
    decode, transform, tokenize = seconds
    return Stages(
        clock.taking(decode, decode_image),
        clock.taking(transform, lambda image: torch.zeros(3, 4, 4)),
        clock.taking(tokenize, lambda texts: torch.zeros(len(texts), 4)),
    )


def test_times_each_stage(tmp_path, write_tar, pairs):
    index = build_index([write_tar(tmp_path / "0.tar", pairs(range(8)))])
    clock = Clock()
    index._content = clock.taking(0.5, index._content)
    speed = bench(index, stages(clock, (2, 1, 0.25)), 5, clock=clock)
    assert speed.samples == 5
    assert speed.seconds == dict(zip(STAGES, (0.5, 2, 1, 0.25), strict=True))
    assert (speed.total, speed.slowest, speed.corrupt) == (3.75, "decode", "")
    assert "JPEG" in speed.advice


def test_corrupt_samples_are_counted_and_not_timed(tmp_path, write_tar, pairs):
    members = [*pairs(range(3)), ("bad.png", b"no picture"), ("bad.txt", b"x"), ("mute.txt", b"y")]
    index = build_index([write_tar(tmp_path / "0.tar", members)])
    speed = bench(index, stages(Clock(), (0, 0, 0)), 100)
    assert speed.samples == 3
    assert speed.corrupt == "1 image, 1 image_missing"


def test_nothing_to_time(tmp_path, write_tar):
    index = build_index([write_tar(tmp_path / "0.tar", [("a.txt", b"x")])])
    with pytest.raises(UserError, match="none of 1 sample tried could be read: 1 image_missing"):
        bench(index, stages(Clock(), (0, 0, 0)), 100)


def test_threads_are_as_before(tmp_path, write_tar, pairs):
    index = build_index([write_tar(tmp_path / "0.tar", pairs(range(2)))])
    before, seen = torch.get_num_threads(), []
    parts = Stages(decode_image, lambda image: seen.append(torch.get_num_threads()), lambda t: t)
    try:
        torch.set_num_threads(2)
        ticks = count()
        bench(index, parts, 2, clock=lambda: float(next(ticks)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(("rate", "workers"), [(1, 1), (99, 1), (101, 2), (950, 10)])
def test_workers_for_a_rate(rate, workers):
    seconds = dict(zip(STAGES, (0.001, 0.006, 0.002, 0.001), strict=True))
    assert Speed(9, seconds, "").workers(rate) == workers


def test_command(tmp_path, write_tar, pairs, capsys):
    shard = write_tar(tmp_path / "0.tar", pairs(range(6)))
    words = ["data", "bench", str(shard), "--model", "glyph-tiny"]
    assert main([*words, "--samples", "4", "--samples-per-second", "1e-3"]) == 0
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in STAGES)
    assert "(4 samples timed)" in printed
    assert "0.001 samples/s need 1 worker " in printed
    assert main([*words, "--samples-per-second", "1e9"]) == 0
    assert "this machine has only" in capsys.readouterr().out
    assert main([*words, "--samples", "0"]) == 2
    assert main(["data", "bench", str(shard), "--model", "no-such"]) == 2
