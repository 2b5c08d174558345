import torch

from neuclip.training.records.fingerprint import add_to_fingerprint


def fingerprint(*batches):
    value = 0
    for batch in batches:
        value = add_to_fingerprint(value, torch.tensor(batch))
    return value


def test_order_and_batching_do_not_matter():
    assert fingerprint([1, 2, 3], [4, 5]) == fingerprint([5, 1], [4, 3, 2])


def test_a_sample_more_less_or_other_does():
    values = [
        fingerprint([1, 2, 3]), fingerprint([1, 2]), fingerprint([1, 2, 3, 3]),
        fingerprint([1, 2, 4]), fingerprint([1, 1, 4]), fingerprint([0, 2, 4]),
    ]  # fmt: skip
    assert len(set(values)) == len(values)


def test_the_published_mixer():
    # SplitMix64's first output for the seed 0.
    assert fingerprint([0]) == 0xE220A8397B1DCDAF
