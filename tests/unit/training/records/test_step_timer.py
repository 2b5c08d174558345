import time

import pytest
import torch

from neuclip.training.records.step_timer import StepTimer


def test_sections_add_up_to_the_whole_time():
    timer = StepTimer(torch.device("cpu"))
    with timer.section("outer"):
        time.sleep(0.01)
        with timer.section("inner"):
            time.sleep(0.02)
    shares = timer.shares()
    assert set(shares) == {"other", "outer", "inner"}
    assert sum(shares.values()) == pytest.approx(1)
    # The outer section does not include the inner one.
    assert shares["inner"] > shares["outer"]
    timer.reset()
    assert set(timer.shares()) == {"other"}
