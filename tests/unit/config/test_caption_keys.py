"""`--caption-keys`, and open_clip's `--json-text-key` with `--json-text-key-probs`."""

import pytest

from command_lines import parse, refusal
from neuclip.config.caption_keys import CaptionKeys


@pytest.mark.parametrize(
    ("flags", "names", "weights"),
    [
        ("--caption-keys a,b", ("a", "b"), (1, 1)),
        ("--caption-keys a=0.7,b=.3,c=0", ("a", "b", "c"), (0.7, 0.3, 0)),
        ("--caption-keys x=y=2", ("x=y",), (2,)),
        ("--caption-key a;b", ("a", "b"), ()),
        ("--json-text-key a;b;c --json-text-key-probs 0.7 0.3", ("a", "b", "c"), (0.7, 0.3, 0)),
    ],
)
def test_keys_and_weights(flags, names, weights):
    assert parse(flags).data.caption_keys_read == CaptionKeys(names, weights)


def test_no_keys():
    assert parse("").data.caption_keys_read is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--caption-keys a=1,b", "--caption-keys a=1,b: expected keys joined by commas"),
        ("--caption-keys a,,b", "expected keys joined by commas"),
        ("--caption-keys a=1,a=2", "'a' is given twice"),
        ("--caption-keys a=-1,b=2", "weights are numbers, 0 or more"),
        ("--caption-keys a=nan", "weights are numbers, 0 or more"),
        ("--caption-keys a=0,b=0", "one of them is above 0"),
        ("--json-text-key-probs 1", "--caption-key-probs needs --caption-key"),
        ("--caption-key a --caption-key-probs 0.5 0.5", "more probabilities than keys"),
        ("--caption-key a;b --caption-key-probs 0 0", "one of them is above 0"),
        ("--caption-keys a --caption-key b", "both name captions"),
        ("--caption-keys a --csv-caption-key b", "both name captions"),
        ("--caption-keys a,b --caption-choice first", "draws nothing"),
    ],
)
def test_contradictions_are_refused(flags, message):
    assert message in refusal(flags)
