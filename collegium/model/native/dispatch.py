"""Binding to the C dispatch plan: one pass over a step's choices in place of a score of array operations.

T tokens, K top-k, E experts, W workers, N pairs.
"""

import functools
from ctypes import c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from collegium.model import native


class Planned:
    """The pairs of all workers, one worker's after another's; sizes [W, 3]: rows, groups and pairs of each.

    One piece of memory: numpy takes longer to make six arrays and tell their addresses than the plan takes.
    """

    __slots__ = ("addresses", "counts", "experts", "pair_rows", "pair_weights", "sizes", "tokens")

    def __init__(self, num_pairs: int, num_workers: int, num_scratch: int):
        """Take memory for so many; nothing is set."""
        ends = [24 * num_workers]
        for size in (8, 4, 4, 2, 2):
            ends.append(ends[-1] + size * num_pairs)
        scratch = -(-ends[-1] // 8) * 8
        memory = np.empty(scratch + 8 * num_scratch, np.uint8)
        start: int = memory.ctypes.data
        self.sizes = memory[: ends[0]].view(np.int64)
        self.tokens = memory[ends[0] : ends[1]].view(np.int64)
        self.pair_weights = memory[ends[1] : ends[2]].view(np.float32)
        self.pair_rows = memory[ends[2] : ends[3]].view(np.uint32)
        self.experts = memory[ends[3] : ends[4]].view(np.uint16)
        self.counts = memory[ends[4] : ends[5]].view(np.uint16)
        self.addresses = (start, *(start + end for end in ends[:5]), start + scratch)


def plan(
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    worker_of: NDArray[np.int64],
    workers: NDArray[np.int64] | None,
    num_workers: int,
) -> Planned:
    """Split choices [T, K], C-contiguous; see `plan_dispatch`. IndexError where an id or a worker is out of range."""
    num_tokens, top_k = ids.shape
    num_experts = len(worker_of)
    planned = Planned(ids.size, num_workers, num_workers * num_experts + num_tokens + 1)
    sizes, tokens, pair_weights, pair_rows, experts, counts, scratch = planned.addresses
    done = _function()(
        ids.ctypes.data,
        weights.ctypes.data,
        worker_of.ctypes.data,
        None if workers is None else workers.ctypes.data,
        num_tokens,
        top_k,
        num_experts,
        num_workers,
        sizes,
        tokens,
        experts,
        counts,
        pair_rows,
        pair_weights,
        scratch,
    )
    if done < 0:
        raise IndexError(f"a choice names an expert or a worker that is not among {num_experts} and {num_workers}")
    return planned


@functools.cache
def _function() -> "native.Function":
    library = native.library()
    assert library is not None
    native.declare(library.raw, "collegium_plan", c_int64, [*[c_void_p] * 4, *[c_int64] * 4, *[c_void_p] * 7])
    function: native.Function = library.raw.collegium_plan
    return function
