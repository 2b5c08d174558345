"""A 64-bit fingerprint of the samples read so far, equal for equal multisets in any order.

SplitMix64's finaliser (Steele, Lea, Flood, 2014) mixes each sample id, and the results are added
modulo 2^64. Two runs that read the same samples equally often have the same fingerprint; other
runs share it with probability 2^-64.
"""

import numpy as np
from jaxtyping import Int64
from torch import Tensor


def add_to_fingerprint(fingerprint: int, sample_ids: Int64[Tensor, " batch"]) -> int:
    """Returns the fingerprint with the samples of one more batch.

    Args:
        fingerprint: of the samples read before; 0 at the start.
        sample_ids: the batch's stable sample ids.
    """
    state = sample_ids.cpu().numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (fingerprint + int(state.sum(dtype=np.uint64))) % 2**64
