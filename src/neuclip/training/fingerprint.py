"""What a run has read, in 64 bits: equal for equal multisets of samples, whatever their order.

Each sample id is mixed by the finaliser of SplitMix64 (Steele, Lea, Flood, 2014), and the results
are added modulo 2^64. Two runs that read the same samples equally often have the same fingerprint;
a sample more or less changes it, but for a chance of one in 2^64.
"""

import numpy as np
from jaxtyping import Int64
from torch import Tensor


def add_to_fingerprint(fingerprint: int, sample_ids: Int64[Tensor, " batch"]) -> int:
    """The fingerprint after some more samples.

    Args:
        fingerprint: of the samples read before; 0 for none.
        sample_ids: the stable ids of a batch.
    """
    state = sample_ids.cpu().numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (fingerprint + int(state.sum(dtype=np.uint64))) % 2**64
