"""Which worker computes which expert now, from a placement and the workers that can be reached.

Owns the choice among homes, by the counts of the step at hand, and the fallback when no home lives. Pure. A placement
that is out of date is never wrong, only slower: any worker computes any expert.
T rows, K top-k, E experts, W live workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from collegium.model import native
from collegium.model.native.dispatch import Copies, choose
from collegium.model.placement import Placement

ACTIVATION_ROWS = 16.0  # until the balancer has measured it: an expert costs a worker as much as so many of its rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRoute:
    """Who computes a layer's experts; numbers are indices into the live workers.

    worker_of: [E], one live home of each, replicas taking turns by expert; replicas: all live homes of experts that
    have several.
    """

    worker_of: NDArray[np.int64]
    replicas: Mapping[int, tuple[int, ...]]
    copies: Copies = field(init=False)

    def __post_init__(self) -> None:
        experts = sorted(self.replicas)
        homes = [self.replicas[expert] for expert in experts]
        copies = Copies(
            experts=np.array(experts, np.int64),
            starts=np.cumsum([0, *map(len, homes)], dtype=np.int64),
            homes=np.array([home for one in homes for home in one], np.int64),
        )
        object.__setattr__(self, "copies", copies)


def route(placement: Placement, live: Sequence[str], num_layers: int, num_experts: int) -> list[LayerRoute]:
    """Say, per layer, who computes what. Where no home lives, rendezvous hashing picks a live worker, so that all
    routers pick the same. `live` must not be empty.
    """
    index = {worker: i for i, worker in enumerate(live)}
    place = [index.get(worker, -1) for worker in placement.worker_ids]
    table: list[LayerRoute] = []
    for layer in range(num_layers):
        known = placement.homes[layer] if layer < len(placement.homes) else ()
        row = np.empty(num_experts, dtype=np.int64)
        replicas: dict[int, tuple[int, ...]] = {}
        for expert in range(num_experts):
            alive = [place[w] for w in (known[expert] if expert < len(known) else ()) if place[w] >= 0]
            row[expert] = alive[expert % len(alive)] if alive else index[_rendezvous(live, layer, expert)]
            if len(alive) > 1:
                replicas[expert] = tuple(alive)
        table.append(LayerRoute(worker_of=row, replicas=replicas))
    return table


def choose_replicas(
    ids: NDArray[np.int64], counts: NDArray[np.int64], route: LayerRoute, num_workers: int, activation_rows: float
) -> NDArray[np.int64] | None:
    """Choose a worker for each pair of a step, [T, K]; None where no chosen expert has several homes: worker_of it is.

    ids: [T, K]; counts: [E], rows of each expert in this step. A worker's work is its rows plus `activation_rows` for
    each expert that it has to read. The busiest worker counts, so an expert goes whole to a home that stays below it,
    of those to the one that most of its tokens visit anyway: fewer rows travel. Where none does, its rows are split
    over as many homes as make the busiest less busy, each part worth reading the expert for.
    """
    if native.library() is None:
        return choose_in_python(ids, counts, route, num_workers, activation_rows)
    if not counts[route.copies.experts].any():
        return None
    ids, counts = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(counts, np.int64)
    worker_of = np.ascontiguousarray(route.worker_of, np.int64)
    return choose(ids, counts, worker_of, route.copies, num_workers, activation_rows)


def choose_in_python(
    ids: NDArray[np.int64], counts: NDArray[np.int64], route: LayerRoute, num_workers: int, activation_rows: float
) -> NDArray[np.int64] | None:
    """Choose without the library, for machines that have none; `choose_replicas` says what."""
    active = [expert for expert in route.replicas if counts[expert]]
    if not active:
        return None
    costs = counts + activation_rows * (counts > 0)
    workers = route.worker_of[ids]
    is_open = np.zeros(len(counts), bool)
    is_open[active] = True
    fixed = np.where(is_open, 0.0, costs)
    work: list[float] = np.bincount(route.worker_of, weights=fixed, minlength=num_workers).tolist()
    visits = np.zeros((len(ids), num_workers), bool)  # [T, W] tokens that go to a worker anyway
    settled = ~is_open[ids]
    visits[np.nonzero(settled)[0], workers[settled]] = True
    for expert in sorted(active, key=lambda e: (-counts[e], e)):
        tokens, ranks = np.nonzero(ids == expert)
        cost = float(costs[expert])
        homes = sorted(route.replicas[expert], key=work.__getitem__)
        busiest = max(max(work), work[homes[0]] + cost)
        parts = _num_parts([work[home] for home in homes], len(tokens), activation_rows, max(work))
        if parts == 1:
            fitting = [home for home in homes if work[home] + cost <= busiest]
            overlap = visits[tokens].sum(0)
            home = max(fitting, key=lambda w: (overlap[w], -work[w], -w))
            workers[tokens, ranks] = home
            visits[tokens, home] = True
            work[home] += cost
            continue
        level = (sum(work[home] for home in homes[:parts]) + len(tokens) + parts * activation_rows) / parts
        begin = 0
        for number, home in enumerate(homes[:parts], 1):
            share = round(level - work[home] - activation_rows) if number < parts else len(tokens) - begin
            end = min(len(tokens), begin + max(0, share))
            workers[tokens[begin:end], ranks[begin:end]] = home
            visits[tokens[begin:end], home] = True
            work[home] += end - begin + activation_rows * (end > begin)
            begin = end
    return workers


def _num_parts(works: Sequence[float], num_rows: int, activation_rows: float, busiest: float) -> int:
    """Over how many of the homes, idlest first, an expert's rows are split: as few as keep the busiest least busy."""
    best, best_level = 1, max(busiest, works[0] + num_rows + activation_rows)
    total = works[0]
    for parts in range(2, len(works) + 1):
        total += works[parts - 1]
        level = (total + num_rows + parts * activation_rows) / parts
        if level - works[parts - 1] < 2 * activation_rows:  # the last part would not be worth reading the expert for
            break
        if max(busiest, level) < best_level:
            best, best_level = parts, max(busiest, level)
    return best


def _rendezvous(live: Sequence[str], layer: int, expert: int) -> str:
    return max(live, key=lambda worker: hashlib.blake2b(f"{worker}/{layer}/{expert}".encode(), digest_size=8).digest())
