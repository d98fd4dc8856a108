"""Keep copies of an expert in more than one failure domain, where that can be had by swapping seats.

Owns nothing but that swap. Wished for, not guaranteed: where no swap is possible, copies stay together.
"""

from __future__ import annotations

import numpy as np

from collegium.balancing.fleet import EMPTY, Bools, Ints, Seats, count_copies


def keep_apart(seats: Seats, domains: Ints) -> Bools:
    """Swap seats until experts with several copies stand in at least two domains. In place.

    Swaps with experts that have one copy, the one of nearest weight. Returns who should stay where it is from then on:
    experts with several copies, [L, E].
    """
    num_experts = int(seats.experts.max()) + 1
    copies = count_copies(seats.experts, num_experts)  # [L, E]
    for layer in range(len(copies)):
        for expert in np.flatnonzero(copies[layer] > 1).tolist():
            _part(seats, layer, expert, domains, copies[layer])
    return copies > 1


def matter(domains: Ints) -> bool:
    """Whether there is anything to keep apart: several domains, and one of several workers."""
    return 1 < len(set(domains.tolist())) < len(domains)


def _part(seats: Seats, layer: int, expert: int, domains: Ints, copies: Ints) -> None:
    rows, weights = seats.experts[layer], seats.weights[layer]  # [W, R]
    workers, slots = np.nonzero(rows == expert)
    if (domains[workers] != domains[workers[0]]).any():
        return
    is_single = (rows != EMPTY) & (copies[rows] == 1) & (domains != domains[workers[0]])[:, None]
    miss = np.where(is_single, np.abs(weights - weights[workers[0], slots[0]]), np.inf)
    other, its_slot = np.unravel_index(int(miss.argmin()), miss.shape)
    if not np.isfinite(miss[other, its_slot]):
        return
    # An expert with one copy is on no other worker, so any of the copies may change places with it.
    worker, slot = workers[-1], slots[-1]
    passed = weights[worker, slot] - weights[other, its_slot]
    rows[worker, slot], rows[other, its_slot] = rows[other, its_slot], rows[worker, slot]
    weights[worker, slot], weights[other, its_slot] = weights[other, its_slot], weights[worker, slot]
    seats.work[layer, worker] -= passed
    seats.work[layer, other] += passed
