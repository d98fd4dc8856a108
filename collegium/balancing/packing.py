"""Say how many copies each expert gets, and seat them: largest first, then swaps until the work is even.

Owns the arithmetic that all layers share: every step is done for all layers at once. Pure and deterministic.
L layers, E experts of a layer, W workers, R slots of the largest worker, S slots of a layer over all workers.
"""

from __future__ import annotations

import numpy as np

from collegium.balancing.fleet import EMPTY, Bools, Fleet, Floats, Ints, Seats, slots_in_use

_HALVINGS = 12  # of the search for the largest load per copy; what that leaves over is handed out one by one
_MOST_ELEMENTS = 1 << 21  # of one array of swap candidates; more layers wait for their turn
_NO_GAIN = 1e-9  # of a gap: swaps that close less are rounding


def choose_copies(loads: Floats, num_seats: Ints, most: int) -> Ints:
    """Give every expert a copy and hand the other seats to the largest load per copy: [L, E], at most `most` each.

    loads: [L, E]; num_seats: [L], at least E. Water filling: the largest load per copy comes out as small as it can be.
    """
    num_experts = loads.shape[1]
    most_seats = np.minimum(num_seats, num_experts * most)[:, None]
    low: Floats = loads.sum(1, keepdims=True) / most_seats
    high: Floats = loads.max(1, keepdims=True) + 1e-300
    wanted = np.empty_like(loads)
    for _ in range(_HALVINGS):
        level: Floats = (low + high) / 2
        np.ceil(np.divide(loads, level, out=wanted), out=wanted)
        fits = np.maximum(wanted, 1, out=wanted).sum(1, keepdims=True) <= most_seats
        high, low = np.where(fits, level, high), np.where(fits, low, level)
    copies = np.clip(np.ceil(loads / high), 1, most).astype(np.int64)
    while (rows := np.flatnonzero(copies.sum(1) < most_seats[:, 0])).size:
        per_copy = np.where(copies[rows] < most, loads[rows] / copies[rows], -1.0)
        copies[rows, per_copy.argmax(1)] += 1
    return copies


def seat(loads: Floats, copies: Ints, fleet: Fleet) -> Seats:
    """Seat all copies, the heaviest first, on the worker that is then least busy, two of an expert never on one.

    copies: [L, E]; where they do not fit, the lightest are left out, never an expert's only one. Returns new seats.
    """
    items, weights = _in_order(loads, copies)
    slots = np.minimum(fleet.num_slots, loads.shape[1])
    num_slots = slots.sum(1)
    if fleet.is_even and items.shape[1] == num_slots[0] and (items >= 0).all():
        return _seat_in_rounds(items, weights, fleet.num_workers)
    seats = _seat_one_by_one(items, weights, slots, fleet.speeds)
    if (seats.experts != EMPTY).sum() < copies.sum():  # some copy was left out: its expert's others carry more
        return Seats.of(seats.experts, loads)
    return seats


def even_out(seats: Seats, fleet: Fleet, target: float, *, max_rounds: int = 40, stay: Bools | None = None) -> None:
    """Swap seats between busy and idle workers until no layer's busiest is above `target` times the mean. In place.

    Each round pairs the workers of each layer, the busiest with the idlest, and makes in each pair the one swap that
    brings the two nearest to each other. An empty slot counts as a seat of weight 0. stay: [L, E], who keeps its seat.
    """
    speeds, slots = fleet.speeds, np.minimum(fleet.num_slots, seats.experts.shape[2])
    ideal = seats.work.sum(1) / speeds.sum()
    num_pairs, width = fleet.num_workers // 2, seats.experts.shape[2]
    per_chunk = max(1, _MOST_ELEMENTS // max(1, num_pairs * width * width))
    for number in range(max_rounds):
        behind = np.flatnonzero((seats.work / speeds).max(1) > target * ideal)
        if not behind.size:
            return
        swapped = False
        for first in range(0, len(behind), per_chunk):
            swapped |= _swap_pairs(seats, behind[first : first + per_chunk], speeds, slots, number, stay)
        if not swapped and number >= num_pairs:  # every pairing has been tried
            return


def _in_order(loads: Floats, copies: Ints) -> tuple[Ints, Floats]:
    """List every layer's copies, the heaviest first, an expert's own side by side: experts and weights, [L, S]."""
    per_copy = loads / copies
    order = np.argsort(-per_copy, axis=1, kind="stable")
    counts = np.take_along_axis(copies, order, 1)
    totals = counts.sum(1)
    size = int(totals.max())
    if (totals == size).all():
        items = np.repeat(order.ravel(), counts.ravel()).reshape(len(loads), size)
        return items, np.take_along_axis(per_copy, items, 1)
    items, weights = np.full((len(loads), size), EMPTY, np.int64), np.zeros((len(loads), size))
    for layer, total in enumerate(totals.tolist()):
        items[layer, :total] = np.repeat(order[layer], counts[layer])
        weights[layer, :total] = per_copy[layer, items[layer, :total]]
    return items, weights


def _seat_in_rounds(items: Ints, weights: Floats, num_workers: int) -> Seats:
    # All workers alike and every slot to be filled: each round gives every worker one, the heaviest to the idlest.
    num_layers, num_items = items.shape
    width = num_items // num_workers
    experts, given = np.empty((num_layers, num_workers, width), np.int64), np.empty((num_layers, num_workers, width))
    work, at = np.zeros((num_layers, num_workers)), _rows(num_layers)[:, None]
    for number in range(width):
        order = work.argsort(1, kind="stable")
        part = slice(number * num_workers, (number + 1) * num_workers)
        experts[at, order, number], given[at, order, number] = items[:, part], weights[:, part]
        work[at, order] += weights[:, part]
    seats = Seats(experts=experts, weights=given, work=work)
    return (
        seats
        if _part_twins(seats)
        else _seat_one_by_one(items, weights, np.full((num_layers, num_workers), width), np.ones(num_workers))
    )


def _part_twins(seats: Seats) -> bool:
    """Swap away second copies of an expert on a worker: those on both sides of a round's end can meet. In place.

    Returns whether all could be.
    """
    for _ in range(seats.experts.shape[2]):
        twins = np.argwhere(seats.experts[:, :, 1:] == seats.experts[:, :, :-1])
        if not twins.size:
            return True
        layer, first = np.unique(twins[:, 0], return_index=True)  # one of each layer at a time
        worker, slot = twins[first, 1], twins[first, 2] + 1
        rows, mine = seats.experts[layer], seats.experts[layer, worker]  # [N, W, R], [N, R]
        lacks = ~(rows == mine[np.arange(len(layer)), slot][:, None, None]).any(2)  # [N, W]
        fits = lacks[:, :, None] & ~(rows[..., None] == mine[:, None, None, :]).any(3)  # [N, W, R]
        far = np.where(fits, np.abs(seats.weights[layer] - seats.weights[layer, worker, slot][:, None, None]), np.inf)
        best = far.reshape(len(layer), -1).argmin(1)
        other, its_slot = best // rows.shape[2], best % rows.shape[2]
        if not fits[np.arange(len(layer)), other, its_slot].all():
            return False
        _swap(seats, layer, worker, slot, other, its_slot)
    return not (seats.experts[:, :, 1:] == seats.experts[:, :, :-1]).any()


def _seat_one_by_one(items: Ints, weights: Floats, slots: Ints, speeds: Floats) -> Seats:
    num_layers, num_workers = slots.shape
    width = max(1, int(slots.max()))
    experts, given = np.full((num_layers, num_workers, width), EMPTY), np.zeros((num_layers, num_workers, width))
    work, used = np.zeros((num_layers, num_workers)), np.zeros((num_layers, num_workers), np.int64)
    # An expert's only copy must find a seat, so further copies leave as many free as there are experts to come.
    to_come = np.array([len(set(row) - {EMPTY}) for row in items.tolist()])
    holds, last, at = np.zeros((num_layers, num_workers), bool), np.full(num_layers, EMPTY), _rows(num_layers)
    for item, weight in zip(items.T, weights.T, strict=True):
        is_new = (item != last) & (item != EMPTY)
        holds[is_new], last = False, item
        to_come -= is_new
        times = (work + weight[:, None]) / speeds
        times[(used >= slots) | holds] = np.inf
        worker = times.argmin(1)
        room = (slots - used).sum(1) - to_come
        can = np.isfinite(times[at, worker]) & (item != EMPTY) & (is_new | (room > 0))
        rows: Ints = at[can]
        worker = worker[can]
        slot = used[rows, worker]
        experts[rows, worker, slot], given[rows, worker, slot] = item[can], weight[can]
        work[rows, worker] += weight[can]
        used[rows, worker] += 1
        holds[rows, worker] = True
    return Seats(experts=experts, weights=given, work=work)


def _swap_pairs(seats: Seats, layers: Ints, speeds: Floats, slots: Ints, number: int, stay: Bools | None) -> bool:
    """Make the best swap of each pair of workers, in some layers. Returns whether there was any."""
    work, width = seats.work[layers], seats.experts.shape[2]
    order = (work / speeds).argsort(1, kind="stable")
    num_pairs = order.shape[1] // 2
    busy, idle = order[:, ::-1][:, :num_pairs], np.roll(order[:, :num_pairs], -number, axis=1)  # [A, P]
    at = layers[:, None]
    gap = np.take_along_axis(work, busy, 1) * speeds[idle] - np.take_along_axis(work, idle, 1) * speeds[busy]
    gap /= speeds[busy] + speeds[idle]  # [A, P] work that would have to go over to make the two equally long
    mine, others = seats.experts[at, busy], seats.experts[at, idle]  # [A, P, R]
    passed = seats.weights[at, busy][..., :, None] - seats.weights[at, idle][..., None, :]  # [A, P, R, R]
    miss = np.abs(np.subtract(passed, gap[..., None, None], out=passed), out=passed)
    if (slots < width).any():
        lacks = ~slots_in_use(slots, width)  # [L, W, R]
        miss[lacks[at, busy][..., :, None] | lacks[at, idle][..., None, :]] = np.inf
    if stay is not None:
        is_bound = np.concatenate([stay, np.zeros((len(stay), 1), bool)], 1)[layers]  # [A, E + 1], EMPTY is the last
        bound = [
            np.take_along_axis(is_bound, rows.reshape(len(layers), -1), 1).reshape(rows.shape)
            for rows in (mine, others)
        ]
        miss[bound[0][..., :, None] | bound[1][..., None, :]] = np.inf
    flat = miss.reshape(len(layers), num_pairs, width * width)
    best = flat.argmin(2)  # [A, P]
    # Few of the best would seat an expert twice: only in those pairs is it worth to look which candidates would.
    a, p = np.nonzero(_meets(mine, others, best // width) | _meets(others, mine, best % width))
    if a.size:
        same = (mine[a, p][..., :, None] == others[a, p][..., None, :]) & (mine[a, p] != EMPTY)[..., :, None]
        barred = same.any(2)[..., :, None] | same.any(1)[..., None, :]
        flat[a, p] = np.where(barred.reshape(len(a), -1), np.inf, flat[a, p])
        best[a, p] = flat[a, p].argmin(1)
    gained = np.take_along_axis(flat, best[..., None], 2)[..., 0] < gap * (1 - _NO_GAIN)
    a, p = np.nonzero(gained)
    if not a.size:
        return False
    chosen = best[a, p]
    _swap(seats, layers[a], busy[a, p], chosen // width, idle[a, p], chosen % width)
    return True


def _rows(number: int) -> Ints:
    """Number rows, to index with."""
    return np.arange(number, dtype=np.int64)


def _meets(rows: Ints, others: Ints, slot: Ints) -> Bools:
    """Whether what sits in a slot [A, P] of rows [A, P, R] sits in the others [A, P, R] too."""
    item = np.take_along_axis(rows, slot[..., None], 2)
    return ((item == others) & (item != EMPTY)).any(2)


def _swap(seats: Seats, layer: Ints, worker: Ints, slot: Ints, other: Ints, its_slot: Ints) -> None:
    one, two = (layer, worker, slot), (layer, other, its_slot)
    passed = seats.weights[one] - seats.weights[two]
    seats.experts[one], seats.experts[two] = seats.experts[two], seats.experts[one]
    seats.weights[one], seats.weights[two] = seats.weights[two], seats.weights[one]
    np.subtract.at(seats.work, (layer, worker), passed)
    np.add.at(seats.work, (layer, other), passed)
