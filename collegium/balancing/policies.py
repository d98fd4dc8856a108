"""The policies by name: from loads to seats, each from nothing.

Owns static, the paper's greedy and anti_correlation (Huang et al., NeurIPS 2024, section 6), and EPLB for comparison,
written from its description (DeepSeek, 2025: replicate the largest load per copy, then pack the heaviest first).
replicated.py has ours. Pure and deterministic. T windows, L layers, E experts of a layer, W workers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from collegium.balancing.fleet import EMPTY, Fleet, Floats, Ints, Seats
from collegium.balancing.replicated import replicate

_CORRELATION_WEIGHT = 0.5  # the paper's


def static(history: Floats, fleet: Fleet) -> Ints:
    """Seat experts in turn, whatever their load; further slots hold copies of the first ones. history: [T, L, E]."""
    num_layers, num_experts = history.shape[1:]
    slots = np.minimum(fleet.num_slots, num_experts)
    experts = np.full((num_layers, fleet.num_workers, int(slots.max())), EMPTY, np.int64)
    for layer, row in enumerate(slots):
        at = 0
        for worker, count in enumerate(row.tolist()):
            experts[layer, worker, :count] = (at + np.arange(count)) % num_experts
            at += count
    return experts


def greedy(history: Floats, fleet: Fleet) -> Ints:
    """Seat experts by falling mean load, each on the worker with the least load that has room. history: [T, L, E]."""
    return _one_by_one(history, fleet, 0.0)


def anti_correlation(history: Floats, fleet: Fleet) -> Ints:
    """Seat as greedy does, but away from experts that are busy at the same time. history: [T, L, E].

    A worker's load for an expert is the sum, over those that it seats, of mean load and 0.5 times Pearson's correlation
    of the two over the windows; loads are in units of a layer's mean expert.
    """
    return _one_by_one(history, fleet, _CORRELATION_WEIGHT)


def eplb(history: Floats, fleet: Fleet) -> Ints:
    """Give each further slot to the largest load per copy, then pack the heaviest first on the lightest with room.

    history: [T, L, E], of which the mean counts. Two copies of an expert may meet on one worker, as in the original.
    """
    loads = history.mean(0)
    num_layers, num_experts = loads.shape
    slots = fleet.num_slots
    experts = np.full((num_layers, fleet.num_workers, int(slots.max())), EMPTY, np.int64)
    for layer in range(num_layers):
        copies = np.ones(num_experts, np.int64)
        items = list(range(num_experts))
        for _ in range(int(slots[layer].sum()) - num_experts):
            hottest = int((loads[layer] / copies).argmax())
            copies[hottest] += 1
            items.append(hottest)
        weights = (loads[layer] / copies)[items]
        work, used = np.zeros(fleet.num_workers), np.zeros(fleet.num_workers, np.int64)
        for at in np.argsort(-weights, kind="stable").tolist():
            worker = int(np.where(used < slots[layer], work, np.inf).argmin())
            experts[layer, worker, used[worker]] = items[at]
            work[worker] += weights[at]
            used[worker] += 1
    return experts


def replicated(history: Floats, fleet: Fleet) -> Ints:
    """Replicate and pack until the busiest worker is at the mean; the default. history: [T, L, E], the mean counts."""
    return replicate(history.mean(0), fleet).experts


Policy = Callable[[Floats, Fleet], Ints]

POLICIES: dict[str, Policy] = {
    "static": static,
    "greedy": greedy,
    "anti_correlation": anti_correlation,
    "eplb": eplb,
    "replicated": replicated,
}
DEFAULT = "replicated"


def _one_by_one(history: Floats, fleet: Fleet, correlation_weight: float) -> Ints:
    num_layers, num_experts = history.shape[1:]
    mean = history.mean(0)  # [L, E]
    mean = mean / np.maximum(mean.mean(1, keepdims=True), 1e-300)
    about = _correlations(history) * correlation_weight if correlation_weight else None
    slots = np.minimum(fleet.num_slots, num_experts)
    num_workers = fleet.num_workers
    seats = Seats(
        experts=np.full((num_layers, num_workers, int(slots.max())), EMPTY, np.int64),
        weights=np.zeros((num_layers, num_workers, int(slots.max()))),
        work=np.zeros((num_layers, num_workers)),
    )
    used = np.zeros((num_layers, num_workers), np.int64)
    at: Ints = np.arange(num_layers, dtype=np.int64)
    affinity = np.zeros((num_layers, num_workers, num_experts))  # sum of correlations with those seated there
    for expert in np.argsort(-mean, axis=1, kind="stable").T:
        cost = (seats.work + affinity[at, :, expert]) / fleet.speeds
        worker = np.where(used < slots, cost, np.inf).argmin(1)
        seats.experts[at, worker, used[at, worker]] = expert
        seats.work[at, worker] += mean[at, expert]
        used[at, worker] += 1
        if about is not None:
            affinity[at, worker] += about[at, expert]
    return seats.experts


def _correlations(history: Floats) -> Floats:
    """Correlate experts' loads over windows: [L, E, E]; 0 where one does not vary."""
    moved = (history - history.mean(0)).transpose(1, 2, 0)  # [L, E, T]
    size = np.sqrt((moved**2).sum(2, keepdims=True))
    unit = np.divide(moved, size, out=np.zeros_like(moved), where=size > 0)
    return unit @ unit.transpose(0, 2, 1)
