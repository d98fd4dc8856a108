"""The default policy: copies for the hottest, seats for all, and a search where that is not even yet.

Owns the order in which ways are tried. The water-filled choice of copies with every slot in use is even where there are
many experts to a worker. Fewer copies are better where workers differ in speed (the fast ones need heavy experts), or
where there are so few experts that each copy counts; there, copies are changed one at a time while that helps.
L layers, E experts of a layer, W workers.
"""

from __future__ import annotations

import numpy as np

from collegium.balancing.domains import keep_apart, matter
from collegium.balancing.fleet import EMPTY, Fleet, Floats, Ints, Seats
from collegium.balancing.packing import choose_copies, even_out, seat

EVEN = 1.005  # of the mean: nearer is not worth the time
_SHARES_OF_SPARE = (0.75, 0.5, 0.25, 0.1, 0.0)  # of the slots beyond one per expert, where all of them are not even
_MOST_SEATS_SEARCHED = 512  # over all layers: the search costs milliseconds a seat, and many seats need none
_MOST_STEPS = 12
_CANDIDATES = 8  # experts that may gain a copy, and that may lose one, at each step


def replicate(loads: Floats, fleet: Fleet, *, even: float = EVEN) -> Seats:
    """Plan from nothing: loads [L, E]. Returns new seats; ValueError where a layer has fewer slots than experts."""
    num_experts = loads.shape[1]
    num_slots = np.minimum(fleet.num_slots, num_experts).sum(1)
    if (num_slots < num_experts).any():
        layer = int(num_slots.argmin())
        raise ValueError(f"layer {layer} has {num_slots[layer]} slots for {num_experts} experts")
    seats = _seated(loads, num_slots, fleet, even)
    spare = num_slots - num_experts
    for share in _SHARES_OF_SPARE:
        layers = np.flatnonzero((_worst(seats, fleet) > even) & (spare > 0))
        if not layers.size:
            break
        part = _part(fleet, layers)
        wanted = num_experts + (spare[layers] * share).astype(np.int64)
        _keep_better(seats, _seated(loads[layers], wanted, part, even), layers, fleet)
    layers = np.flatnonzero((_worst(seats, fleet) > even) & (spare > 0))
    if layers.size and num_slots[layers].sum() <= _MOST_SEATS_SEARCHED:
        for layer in layers:
            _search(seats, int(layer), loads, num_slots, fleet, even)
    if matter(fleet.domains):
        even_out(seats, fleet, even, stay=keep_apart(seats, fleet.domains))
    return seats


def _seated(loads: Floats, num_seats: Ints, fleet: Fleet, even: float) -> Seats:
    seats = seat(loads, choose_copies(loads, num_seats, fleet.num_workers), fleet)
    even_out(seats, fleet, even)
    return seats


def _search(seats: Seats, layer: int, loads: Floats, num_slots: Ints, fleet: Fleet, even: float) -> None:
    """Change a layer's copies one at a time, from several starts, and keep the best that is found. In place."""
    row, part = loads[layer : layer + 1], _part(fleet, np.array([layer]))
    num_experts, most = row.shape[1], int(num_slots[layer])
    spare = most - num_experts
    begun: set[tuple[int, ...]] = set()
    for num_seats in sorted({num_experts + round(spare * share) for share in (1.0, *_SHARES_OF_SPARE)}):
        copies = choose_copies(row, np.array([num_seats]), fleet.num_workers)[0]
        best = np.inf
        for _ in range(_MOST_STEPS):
            if tuple(copies.tolist()) in begun:
                break
            begun.add(tuple(copies.tolist()))
            choices = _neighbours(copies, row[0], most, fleet.num_workers)
            many = _repeat(part, len(choices))
            tried = seat(np.repeat(row, len(choices), 0), choices, many)
            even_out(tried, many, even)
            times = (tried.work / fleet.speeds).max(1)
            at = int(times.argmin())
            if not times[at] < best:
                break
            best, copies = float(times[at]), choices[at]
            found = Seats(
                experts=tried.experts[at : at + 1], weights=tried.weights[at : at + 1], work=tried.work[at : at + 1]
            )
            _keep_better(seats, found, np.array([layer]), fleet)


def _neighbours(copies: Ints, loads: Floats, most_seats: int, most_copies: int) -> Ints:
    """List copies that differ by one more, one less, or one handed on; the present ones first."""
    per_copy = np.where(copies < most_copies, loads / copies, -1.0)
    gainers = [e for e in np.argsort(-per_copy, kind="stable")[:_CANDIDATES].tolist() if per_copy[e] >= 0]
    after_loss = np.where(copies > 1, loads / np.maximum(copies - 1, 1), np.inf)
    losers = [e for e in np.argsort(after_loss, kind="stable")[:_CANDIDATES].tolist() if copies[e] > 1]
    unit = np.eye(len(copies), dtype=np.int64)
    choices = [copies]
    if copies.sum() < most_seats:
        choices += [copies + unit[gainer] for gainer in gainers]
    choices += [copies - unit[loser] for loser in losers]
    choices += [copies + unit[gainer] - unit[loser] for gainer in gainers for loser in losers if gainer != loser]
    return np.stack(choices)


def _worst(seats: Seats, fleet: Fleet) -> Floats:
    """Give each layer's busiest over the mean; 0 for a layer without load, which is even."""
    ideal = seats.work.sum(1) / fleet.speeds.sum()
    worst = (seats.work / fleet.speeds).max(1)
    return np.divide(worst, ideal, out=np.zeros_like(ideal), where=ideal > 0)


def _keep_better(seats: Seats, tried: Seats, layers: Ints, fleet: Fleet) -> None:
    is_better = (tried.work / fleet.speeds).max(1) < (seats.work[layers] / fleet.speeds).max(1)
    width = min(seats.experts.shape[2], tried.experts.shape[2])
    at = layers[is_better]
    for mine, its, empty in ((seats.experts, tried.experts, EMPTY), (seats.weights, tried.weights, 0)):
        mine[at] = empty
        mine[at, :, :width] = its[is_better, :, :width]
    seats.work[at] = tried.work[is_better]


def _part(fleet: Fleet, layers: Ints) -> Fleet:
    return Fleet(num_slots=fleet.num_slots[layers], speeds=fleet.speeds, domains=fleet.domains)


def _repeat(fleet: Fleet, times: int) -> Fleet:
    return Fleet(num_slots=np.repeat(fleet.num_slots, times, 0), speeds=fleet.speeds, domains=fleet.domains)
