"""Who takes how many pairs of a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuclip.config.batch_size import check_epoch, describe_step, share_batch
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError


def run(batch_size=8, accum_freq=1, total=None):
    data = {"batch_size": batch_size, "accum_freq": accum_freq, "global_batch_size": total}
    return RunConfig.model_validate({"data": data})


def sizes(config):
    return config.data.batch_size, config.data.accum_freq, config.data.global_batch_size


def kept(config, processes):
    """What a run folder keeps: the settings as asked for, with the global batch."""
    total = share_batch(config, processes).data.global_batch_size
    data = config.data.model_copy(update={"global_batch_size": total})
    return config.model_copy(update={"data": data})


def test_what_was_asked_for():
    assert sizes(share_batch(run(8), 3)) == (8, 1, 24)
    assert sizes(share_batch(run(8, 4), 3)) == (8, 4, 96)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(1, (8, 6)), (2, (8, 3)), (3, (8, 2)), (4, (6, 2)), (6, (8, 1)), (8, (6, 1))],
)
def test_a_global_batch_is_shared(processes, expected):
    assert sizes(share_batch(run(8, total=48), processes)) == (*expected, 48)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6])
def test_a_run_that_goes_on_keeps_its_batch(processes):
    before = kept(run(8), 6)
    assert share_batch(run(8), processes, before).data.global_batch_size == 48
    # ... and so does one that goes on from there.
    after = kept(before, processes)
    assert sizes(share_batch(run(8), 6, after)) == (8, 1, 48)


def test_another_batch_size_is_not_overruled():
    """The checkpoint then refuses it, by name."""
    assert share_batch(run(10), 2, kept(run(8), 6)).data.global_batch_size == 20
    assert share_batch(run(8, 2), 2, kept(run(8), 6)).data.global_batch_size == 32
    assert share_batch(run(8, total=64), 2, kept(run(8), 6)).data.global_batch_size == 64


def test_an_old_run_folder_says_nothing():
    assert share_batch(run(8), 2, run(8)).data.global_batch_size == 16


def test_unequal_shares():
    with pytest.raises(UserError, match=r"48 pairs .* by 5 processes; 2, 3, 4, 6, 8 can"):
        share_batch(run(8, total=48), 5)


def test_words():
    assert describe_step(share_batch(run(8, total=48), 2), 2) == (
        "48 = 8 x 3 micro-batches x 2 processes"
    )


@given(st.integers(1, 64), st.integers(1, 40), st.integers(2, 64))
def test_shares_are_equal_and_small(share, processes, most):
    total = 2 * share * processes
    shared = share_batch(run(most, total=total), processes)
    micro, count, whole = sizes(shared)
    assert micro * count * processes == whole == total
    assert micro >= 2
    assert micro <= most or all(2 * share % size for size in range(2, most + 1))


def test_an_epoch_has_at_least_a_step():
    check_epoch(64, 64, "64 x 1 process")
    with pytest.raises(UserError, match=r"63 samples is less than .* 64 \(64 x 1 process\)"):
        check_epoch(63, 64, "64 x 1 process")
