"""Runs that equal the plain batch, and the schedule of gamma in words."""

import re

import pytest

from neuclip.catalogue.method_settings import MixingSettings
from neuclip.catalogue.registry import METHODS, method_settings

PUBLISHED = ["fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3", "neuclip"]
AVERAGES = ["sogclr", "isogclr", "scent"]


def reason(name: str, epochs: float, **settings: object) -> str | None:
    asked = method_settings(name, settings)
    if isinstance(asked, MixingSettings):
        asked = asked.for_length(epochs)
    return asked.batch_only(epochs)


@pytest.mark.parametrize("name", METHODS)
def test_which_runs_take_the_normalizers_from_the_batch_alone(name):
    one, two, long = (reason(name, epochs) for epochs in (1, 2, 24))
    assert long is None
    assert (one is not None) == (name in [*PUBLISHED, *AVERAGES, "amorlip"])
    assert (two is not None) == (name in PUBLISHED)  # by the rule for gamma
    for message in (one, two):
        assert message is None or "the batch's own normalizers" in message
        assert message is None or re.search(r"\(.*--", message)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_setting_that_is_named_changes_it(name):
    assert "--epochs 2 --gamma 0.4" in reason(name, 1, gamma=0.4)
    assert reason(name, 2, gamma=0.4) is None
    assert "--gamma 0.4" in reason(name, 7)
    assert reason(name, 8) is None


def test_other_settings_that_change_it():
    assert reason("amorlip", 1, fit_previous=False) is None
    assert reason("neuclip", 1, mixing="none") is None
    assert "--gamma 0.4" in reason("neuclip_pool", 30, gamma=1.0)


def test_gamma_in_words():
    def words(name: str, **settings: object) -> str | None:
        asked = method_settings(name, settings)
        if isinstance(asked, MixingSettings):
            asked = asked.for_length(2)
        return METHODS[name].resolve(asked, 64, None).gamma_text(64)

    assert words("neuclip_pool") == (
        "1 while the pool fills (128 steps, or a quarter of the way if that is less), then along "
        "half a cosine to 0.4 at the end of epoch 2, changing at every step"
    )
    assert words("fastclip_v3", gamma=0.7, gamma_schedule="constant") == (
        "1 in the first epoch, then 0.7, changing once per epoch"
    )
    for name in ("openclip", "scent", "fastclip_v3"):
        assert words(name) is None
