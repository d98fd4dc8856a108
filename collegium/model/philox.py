"""Draw uniform numbers from counters: Philox-4x32-10, vectorised over rows.

Owns the generator behind seeded sampling. Keeps no state: the number for (seed, choice, position) is a pure function of
these three, so it depends neither on the batch nor on the process, and a resumed choice draws what it would have drawn.
Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011. The tests hold it against the known
answers of the authors' library Random123.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MAX_COUNTER = 2**32


def philox(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Encrypt counters [N, 4] with keys [N, 2] into [N, 4]: all are 32-bit words held in uint64."""
    c0, c1, c2, c3 = counters.T
    k0, k1 = keys.T
    for round_idx in range(NUM_ROUNDS):
        if round_idx:
            k0 = (k0 + np.uint64(_KEY_STEPS[0])) & _LOW
            k1 = (k1 + np.uint64(_KEY_STEPS[1])) & _LOW
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits always fit into 64
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _LOW, (left >> _HALF) ^ c3 ^ k1, left & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(draws: Sequence[tuple[int, int, int]]) -> NDArray[np.float64]:
    """Return one number in [0, 1) with 53 random bits for each (seed, choice, position).

    seed < 2**64, choice and position < 2**32, all >= 0; ValueError otherwise.
    """
    for seed, choice, position in draws:
        if not (0 <= seed < 2**64 and 0 <= choice < _MAX_COUNTER and 0 <= position < _MAX_COUNTER):
            raise ValueError(f"no random number for seed {seed}, choice {choice}, position {position}: out of range")
    keys = np.array([(seed & 0xFFFFFFFF, seed >> 32) for seed, _, _ in draws], np.uint64).reshape(-1, 2)
    counters = np.array([(position, choice, 0, 0) for _, choice, position in draws], np.uint64).reshape(-1, 4)
    words = philox(counters, keys)
    high, low = words[:, 0] >> np.uint64(5), words[:, 1] >> np.uint64(6)  # 27 and 26 bits
    return (high * np.float64(2**26) + low) / np.float64(2**53)
