"""What a plan is made for and what it is: workers with slots, loads of experts, and who sits in which slot.

Owns the arrays' meaning and what is measured on them. Pure. A replica carries its expert's load divided by its copies.
L layers, E experts of a layer, W workers, R slots of the largest worker in a layer, T windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EMPTY = -1  # in a slot that holds no expert, or that a smaller worker does not have


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Workers as a plan sees them.

    num_slots: [L, W] experts that each may be home to, at most E are used; speeds: [W], work per time, any unit;
    domains: [W], equal numbers fail together: copies of an expert are kept apart where that can be done.
    """

    num_slots: Ints
    speeds: Floats
    domains: Ints

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self.speeds)

    @property
    def is_even(self) -> bool:
        """Whether all workers are alike."""
        return bool((self.num_slots == self.num_slots[:, :1]).all() and (self.speeds == self.speeds[0]).all())


def make_fleet(
    num_layers: int,
    num_workers: int,
    num_slots: int,
    *,
    speeds: Sequence[float] | None = None,
    domains: Sequence[int] | None = None,
) -> Fleet:
    """Spread `num_slots` slots of each layer over the workers as evenly as it goes; who has one more differs by layer.

    ValueError for numbers that make no fleet.
    """
    if num_workers < 1 or num_slots < 1:
        raise ValueError(f"{num_workers} workers with {num_slots} slots: at least one of each is needed")
    if speeds is not None and (len(speeds) != num_workers or min(speeds) <= 0):
        raise ValueError(f"speeds: {num_workers} numbers above 0 are needed, one per worker")
    each, left = divmod(num_slots, num_workers)
    slots = np.full((num_layers, num_workers), each, np.int64)
    for layer in range(num_layers):
        slots[layer, (layer * left + np.arange(left)) % num_workers] += 1
    return Fleet(
        num_slots=slots,
        speeds=np.asarray(speeds if speeds is not None else [1.0] * num_workers, np.float64),
        domains=np.asarray(domains if domains is not None else range(num_workers), np.int64),
    )


@dataclass(slots=True, kw_only=True)
class Seats:
    """Who sits where: experts [L, W, R], EMPTY in free slots; mutable, its own arrays.

    weights [L, W, R]: the load of each seated replica, 0 where EMPTY; work [L, W]: their sums.
    """

    experts: Ints
    weights: Floats
    work: Floats

    @staticmethod
    def of(experts: Ints, loads: Floats) -> Seats:
        """Weigh seats that are taken: loads [L, E]."""
        weights = weigh(experts, loads)
        return Seats(experts=experts, weights=weights, work=weights.sum(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan: experts [L, W, R], EMPTY in free slots, and why it is as it is, one line a decision."""

    experts: Ints
    reasons: tuple[str, ...] = field(default=())

    def to_lists(self) -> list[list[list[int]]]:
        """Give placement[layer][worker] = experts, rising."""
        return [[sorted(e for e in row if e != EMPTY) for row in layer] for layer in self.experts.tolist()]


def from_lists(placement: Sequence[Sequence[Sequence[int]]], num_workers: int, num_experts: int) -> Ints:
    """Lay out placement[layer][worker] = experts as [L, W, R].

    Workers beyond `num_workers` are dropped, those that are missing are empty. ValueError where an expert is not one of
    the layer's or sits twice on a worker.
    """
    width = max((len(row) for layer in placement for row in layer), default=1)
    experts = np.full((len(placement), num_workers, max(1, width)), EMPTY, np.int64)
    for i, layer in enumerate(placement):
        for w, row in enumerate(layer):
            if len(set(row)) != len(row):
                raise ValueError(f"placement[{i}][{w}] names an expert twice: {list(row)}")
            if row and not 0 <= min(row) <= max(row) < num_experts:
                raise ValueError(f"placement[{i}][{w}] names an expert outside 0 to {num_experts - 1}: {list(row)}")
            if w < num_workers:
                experts[i, w, : len(row)] = row
    return experts


def slots_in_use(num_slots: Ints, width: int) -> Bools:
    """Say which of `width` columns are slots of each worker: num_slots [..., W] gives [..., W, width]."""
    columns: Ints = np.arange(width, dtype=np.int64)
    return columns < num_slots[..., None]


def count_copies(experts: Ints, num_experts: int) -> Ints:
    """Count each expert's replicas: [L, E]."""
    num_layers = len(experts)
    flat = (experts.reshape(num_layers, -1) + 1 + (num_experts + 1) * np.arange(num_layers)[:, None]).ravel()
    counts = np.bincount(flat, minlength=num_layers * (num_experts + 1))
    return counts.reshape(num_layers, num_experts + 1)[:, 1:]


def weigh(experts: Ints, loads: Floats) -> Floats:
    """Give each slot the load of what sits in it, [L, W, R]; 0 where EMPTY."""
    num_layers, num_experts = loads.shape
    per_copy = np.zeros((num_layers, num_experts + 1))
    per_copy[:, :-1] = loads / np.maximum(count_copies(experts, num_experts), 1)
    return np.take_along_axis(per_copy, experts.reshape(num_layers, -1), 1).reshape(experts.shape)  # EMPTY is the last


def max_over_mean(experts: Ints, loads: Floats, speeds: Floats) -> Floats:
    """Give, per layer, the busiest worker's time over that of a perfect split: [L], at least 1; 1 without load.

    The reciprocal is the layer's balancedness.
    """
    times = weigh(experts, loads).sum(2) / speeds
    ideal = loads.sum(1) / speeds.sum()
    return np.divide(times.max(1), ideal, out=np.ones(len(loads)), where=ideal > 0)


def max_loads(experts: Ints, history: Floats) -> tuple[float, float]:
    """Give the paper's Max Load and Avg Max Load of history [T, L, E], as means over layers.

    The largest share of a layer's load that one worker has in any window, and the mean over windows of that share.
    """
    shares: list[Floats] = []
    for loads in history:
        work = weigh(experts, loads).sum(2)
        total = np.maximum(loads.sum(1), 1e-300)
        shares.append(work.max(1) / total)
    by_window = np.stack(shares)  # [T, L]
    return float(by_window.max(0).mean()), float(by_window.mean())


def count_moves(before: Ints, after: Ints, num_experts: int) -> int:
    """Count the (layer, worker, expert) of `after` that are not in `before`: what would have to be loaded."""
    return int((_seated(after, num_experts) & ~_seated(before, num_experts)).sum())


def _seated(experts: Ints, num_experts: int) -> Bools:
    seated = np.zeros((*experts.shape[:2], num_experts + 1), bool)
    np.put_along_axis(seated, experts, True, 2)  # EMPTY is the last
    return seated[:, :, :-1]
