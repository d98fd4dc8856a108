"""Binding to the C dispatch plan: one pass over a step's choices in place of a score of array operations.

T tokens, K top-k, E experts, W workers, N pairs.
"""

import functools
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Experts with several homes: experts [M], rising; the homes of each, homes[starts[m] : starts[m + 1]]."""

    experts: NDArray[np.int64]
    starts: NDArray[np.int64]
    homes: NDArray[np.int64]
    addresses: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Learn where the arrays lie, once: numpy takes a microsecond to say it."""
        arrays = (self.experts, self.starts, self.homes)
        object.__setattr__(self, "addresses", tuple(array.ctypes.data for array in arrays))


def choose(
    ids: NDArray[np.int64],
    counts: NDArray[np.int64],
    worker_of: NDArray[np.int64],
    copies: Copies,
    num_workers: int,
    activation_rows: float,
) -> NDArray[np.int64] | None:
    """Choose a worker for each choice [T, K]; None where no copied expert was chosen. See `choose_replicas`."""
    num_tokens, top_k = ids.shape
    num_copied, num_experts = len(copies.experts), len(worker_of)
    order = 8 * num_workers
    visits = order + 8 * (num_copied + num_workers)
    given = visits + num_tokens * num_workers
    scratch = np.empty(given + num_experts, np.uint8)
    start: int = scratch.ctypes.data
    workers = np.empty_like(ids)
    active = _choose()(
        ids.ctypes.data,
        counts.ctypes.data,
        worker_of.ctypes.data,
        *copies.addresses,
        num_copied,
        num_tokens,
        top_k,
        num_experts,
        num_workers,
        activation_rows,
        workers.ctypes.data,
        start,
        start + visits,
        start + order,
        start + given,
    )
    return workers if active else None


@functools.cache
def _choose() -> "native.Function":
    library = native.library()
    assert library is not None
    types = [*[c_void_p] * 6, *[c_int64] * 5, c_double, *[c_void_p] * 5]
    native.declare(library.raw, "collegium_choose_replicas", c_int64, types)
    function: native.Function = library.raw.collegium_choose_replicas
    return function


@functools.cache
def _function() -> "native.Function":
    library = native.library()
    assert library is not None
    native.declare(library.raw, "collegium_plan", c_int64, [*[c_void_p] * 4, *[c_int64] * 4, *[c_void_p] * 7])
    function: native.Function = library.raw.collegium_plan
    return function
