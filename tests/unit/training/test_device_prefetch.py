"""Micro-batches are grouped into steps and moved to the device."""

import torch

from neuclip.training.device_prefetch import DevicePrefetcher
from step_parts import CPU, batch


def test_steps_take_their_micro_batches_in_order():
    batches = [batch(number, 2) for number in range(4)]
    prefetcher, source = DevicePrefetcher(2, CPU), iter(batches)
    steps = [prefetcher.next_step(source) for _ in range(3)]
    assert steps == [batches[:2], batches[2:], []]


def test_a_single_batch_is_moved_and_its_ids_stay():
    (moved,) = DevicePrefetcher(1, torch.device("meta")).next_step(iter([batch(0)]))
    assert {moved.images.device.type, moved.tokens.device.type} == {"meta"}
    assert moved.sample_ids.device.type == "cpu"
