"""Which worker computes which expert now, from a placement and the workers that can be reached.

Owns the choice among homes and the fallback when no home lives. Pure. A placement that is out of date is never wrong,
only slower: any worker computes any expert.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collegium.model.placement import Placement


def route(placement: Placement, live: Sequence[str], num_layers: int, num_experts: int) -> list[NDArray[np.int64]]:
    """Give, per layer, worker_of [E]: an index into `live`.

    A live home is preferred, replicas taking turns by expert; without one, rendezvous hashing picks a live worker, so
    that all routers pick the same. `live` must not be empty.
    """
    index = {worker: i for i, worker in enumerate(live)}
    place = [index.get(worker, -1) for worker in placement.worker_ids]
    table: list[NDArray[np.int64]] = []
    for layer in range(num_layers):
        known = placement.homes[layer] if layer < len(placement.homes) else ()
        row = np.empty(num_experts, dtype=np.int64)
        for expert in range(num_experts):
            alive = [place[w] for w in (known[expert] if expert < len(known) else ()) if place[w] >= 0]
            row[expert] = alive[expert % len(alive)] if alive else index[_rendezvous(live, layer, expert)]
        table.append(row)
    return table


def _rendezvous(live: Sequence[str], layer: int, expert: int) -> str:
    return max(live, key=lambda worker: hashlib.blake2b(f"{worker}/{layer}/{expert}".encode(), digest_size=8).digest())
