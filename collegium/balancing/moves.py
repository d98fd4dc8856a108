"""Move experts from where they sit today: what gains most per byte first, and nothing that does not pay.

Owns the moves of one plan. Layers are planned apart, each with an eye to its busiest worker, and the moves of all are
then taken in the order of what they gain. A move seats an expert in one slot; a swap is two. Pure and deterministic.
L layers, E experts of a layer, W workers, R slots of the largest worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from collegium.balancing.domains import matter
from collegium.balancing.fleet import EMPTY, Bools, Fleet, Floats, Ints, count_copies, slots_in_use

Seating: TypeAlias = tuple[int, int, int]  # worker, the expert that comes or EMPTY, the one that goes or EMPTY

_HOTTEST = 4  # experts of the busiest worker that may get another copy, at each step
_FAR = 0.3  # of the ideal time above what is allowed: from there on a copy may gain more per load than a swap
_NO_GAIN = 1e-9  # of the ideal time: less is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a plan may cost.

    byte_budget: of all moves together, None without one; expert_bytes: [L]. With seconds_per_byte above 0 a move must
    pay: what the busiest worker saves over horizon_s, loads being seconds of work per second, must exceed what loading
    takes.
    """

    expert_bytes: Ints
    byte_budget: int | None = None
    seconds_per_byte: float = 0.0
    horizon_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A change that is made whole."""

    seatings: tuple[Seating, ...]
    after: float  # the busiest worker's time once it is made, over the mean

    @property
    def num_loads(self) -> int:
        """Experts that workers have to load for it."""
        return _num_loads(self.seatings)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What was planned."""

    experts: Ints  # [L, W, R]
    num_moves: int = 0
    num_bytes: int = 0
    reasons: list[str] = field(default_factory=list[str])


def rebalance(experts: Ints, loads: Floats, fleet: Fleet, *, target: float, terms: Terms) -> Outcome:
    """Plan moves from the seats of today until each layer's busiest is at `target` times the mean, as far as it pays.

    experts: [L, W, R], not modified; loads [L, E]. Experts that nobody seats are seated first, whatever it costs.
    Raises ValueError where a layer has fewer slots than experts.
    """
    num_experts = loads.shape[1]
    outcome = Outcome(experts=_widen(experts, fleet, num_experts))
    groups: list[tuple[float, int, int, int]] = []  # (-gain per byte, layer, first step, end)
    steps: list[list[Step]] = []
    starts: list[float] = []
    for layer in range(len(loads)):
        bench = _Bench(outcome.experts[layer], loads[layer], fleet, layer, target)
        seated = bench.repair()
        if seated:
            outcome.num_moves += len(seated)
            outcome.num_bytes += len(seated) * int(terms.expert_bytes[layer])
            outcome.reasons.append(f"layer {layer}: {_listed(seated)} had no home and got one")
        starts.append(bench.worst)
        outcome.experts[layer] = bench.rows
        steps.append(bench.level())
        begin = 0
        while begin < len(steps[layer]):
            rate, end = _best_prefix(starts[layer], steps[layer], begin)
            ideal = bench.ideal
            heapq.heappush(groups, (-rate * ideal / max(1, int(terms.expert_bytes[layer])), layer, begin, end))
            begin = end
        if not steps[layer] and starts[layer] > target:
            outcome.reasons.append(
                f"layer {layer}: stays at {starts[layer]:.3f} of the mean, no move makes it more even"
            )
    _take(outcome, groups, steps, starts, loads, fleet, terms)
    assert (count_copies(outcome.experts, num_experts) > 0).all()
    return outcome


def _take(
    outcome: Outcome,
    groups: list[tuple[float, int, int, int]],
    steps: Sequence[Sequence[Step]],
    starts: Sequence[float],
    loads: Floats,
    fleet: Fleet,
    terms: Terms,
) -> None:
    """Make the groups of steps in the order of their gain per byte, while the budget lasts and they pay."""
    ended: set[int] = set()
    done = [0] * len(steps)
    while groups:
        rate, layer, begin, end = heapq.heappop(groups)
        if layer in ended or done[layer] != begin:
            ended.add(layer)
            continue
        group = steps[layer][begin:end]
        before = steps[layer][begin - 1].after if begin else starts[layer]
        num_loads = sum(step.num_loads for step in group)
        num_bytes = num_loads * int(terms.expert_bytes[layer])
        saved_s = -rate * num_bytes * terms.horizon_s
        costs_s = num_bytes * terms.seconds_per_byte
        what = f"{num_loads} loads, {num_bytes / 2**20:.1f} MiB, {before:.3f} -> {group[-1].after:.3f} of the mean"
        if terms.seconds_per_byte and saved_s <= costs_s:
            outcome.reasons.append(
                f"layer {layer}: not done, {what}: would save {saved_s * 1e3:.1f} ms in {terms.horizon_s:g} s "
                f"and take {costs_s * 1e3:.1f} ms to load"
            )
            ended.add(layer)
            continue
        if terms.byte_budget is not None and outcome.num_bytes + num_bytes > terms.byte_budget:
            left = terms.byte_budget - outcome.num_bytes
            outcome.reasons.append(f"layer {layer}: not done, {what}: {left / 2**20:.1f} MiB of the budget are left")
            ended.add(layer)
            continue
        for step in group:
            for worker, expert, gone in step.seatings:
                row = outcome.experts[layer, worker]
                row[int(np.flatnonzero(row == gone)[0])] = expert
            outcome.reasons.append(f"layer {layer}: {_told(step)}, then {step.after:.3f} of the mean")
        outcome.num_moves += num_loads
        outcome.num_bytes += num_bytes
        done[layer] = end


def _best_prefix(start: float, steps: Sequence[Step], begin: int) -> tuple[float, int]:
    """Find the run of steps from `begin` on that gains most per load: (times of the mean per load, end)."""
    before = steps[begin - 1].after if begin else start
    best, end, num_loads = -np.inf, begin + 1, 0
    for at in range(begin, len(steps)):
        num_loads += steps[at].num_loads
        rate = (before - steps[at].after) / num_loads
        if rate > best:
            best, end = rate, at + 1
    return float(best), end


def _told(step: Step) -> str:
    return ", ".join(
        f"expert {expert} to worker {worker}" + (f" for {gone}" if gone != EMPTY else "")
        for worker, expert, gone in step.seatings
        if expert != EMPTY
    )


def _num_loads(seatings: Sequence[Seating]) -> int:
    return sum(expert != EMPTY for _, expert, _ in seatings)


def _listed(seated: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"expert {expert} (worker {worker})" for worker, expert in seated[:8]) + (
        f" and {len(seated) - 8} more" if len(seated) > 8 else ""
    )


def _widen(experts: Ints, fleet: Fleet, num_experts: int) -> Ints:
    """Copy seats, free ones last, with as many columns as anybody has experts or can have: no more, they cost time."""
    order = np.argsort(experts == EMPTY, axis=2, kind="stable")
    packed = np.take_along_axis(experts, order, 2)
    taken = int((experts != EMPTY).sum(2).max())
    width = max(1, taken, int(np.minimum(fleet.num_slots, num_experts).max()))
    wide = np.full((*experts.shape[:2], width), EMPTY, np.int64)
    wide[:, :, :taken] = packed[:, :, :taken]
    return wide


class _Bench:
    """One layer's seats, while moves are tried. rows: [W, R], the layer's own copy."""

    def __init__(self, rows: Ints, loads: Floats, fleet: Fleet, layer: int, target: float) -> None:
        self.rows = rows.copy()
        self.loads, self.speeds = loads, fleet.speeds
        self.slots = np.minimum(fleet.num_slots[layer], len(loads))
        self._domains = fleet.domains if matter(fleet.domains) else None
        if int(self.slots.sum()) < len(loads):
            raise ValueError(f"layer {layer} has {int(self.slots.sum())} slots for {len(loads)} experts")
        self.ideal = float(loads.sum() / self.speeds.sum())
        self._allowed = target * self.ideal
        self._weigh()

    @property
    def worst(self) -> float:
        """The busiest worker's time over the mean; 1 without load."""
        return float(self.times.max()) / self.ideal if self.ideal > 0 else 1.0

    def _weigh(self) -> None:
        self.copies = np.bincount(self.rows[self.rows >= 0], minlength=len(self.loads))
        self.per_copy = np.append(self.loads / np.maximum(self.copies, 1), 0.0)  # [E + 1], EMPTY is the last
        self.weights = self.per_copy[self.rows]
        self.times = self.weights.sum(1) / self.speeds

    def repair(self) -> list[tuple[int, int]]:
        """Let workers keep what they have slots for, and seat experts that nobody seats: [(worker, expert)]."""
        for worker, slots in enumerate(self.slots.tolist()):
            seated = [e for e in dict.fromkeys(self.rows[worker].tolist()) if e != EMPTY]
            # Those that others seat too go first, then the lightest.
            seated.sort(key=lambda e: (self.copies[e] > 1, -self.loads[e], e))
            self.rows[worker] = EMPTY
            kept = seated[:slots]
            self.rows[worker, : len(kept)] = kept
            self._weigh()
        seated_now: list[tuple[int, int]] = []
        homeless = np.flatnonzero(self.copies == 0)
        for expert in homeless[np.argsort(-self.loads[homeless], kind="stable")].tolist():
            room = (self.rows != EMPTY).sum(1) < self.slots
            if not room.any():
                self._drop_a_copy()
                room = (self.rows != EMPTY).sum(1) < self.slots
            times = np.where(room, self.times + self.loads[expert] / self.speeds, np.inf)
            worker = int(times.argmin())
            self._seat(worker, EMPTY, expert)
            seated_now.append((worker, expert))
        return seated_now

    def level(self) -> list[Step]:
        """Find the steps that bring the busiest below what is allowed, the best per load at each turn."""
        steps: list[Step] = []
        most = 4 * self.rows.size + 16
        while self.times.max() > self._allowed and len(steps) < most:
            change, gain = self._best_swap()
            over = float(self.times.max()) - self._allowed
            if change is None or over > _FAR * self.ideal or gain * _num_loads(change) < over:
                copied, copied_gain = self._best_copy()
                if copied is not None and (change is None or copied_gain > gain):
                    change = copied
            if change is None:
                break
            for worker, expert, gone in change:
                self._put(worker, gone, expert)
            self._weigh()
            steps.append(Step(seatings=tuple(change), after=self.worst))
        return steps

    def _excess(self, times: Floats) -> Floats:
        return np.maximum(times - self._allowed, 0.0)

    def _best_swap(self) -> tuple[list[Seating] | None, float]:
        """Swap a seat of the busiest worker, or give it to a free slot: (seatings, excess time taken away per load)."""
        busy = int(self.times.argmax())
        width = self.rows.shape[1]
        mine, mine_weights = self.rows[busy], self.weights[busy]
        usable = slots_in_use(self.slots, width)  # [W, R]
        passed = mine_weights[:, None, None] - self.weights[None]  # [R, W, R] from the busiest to the other
        excess = self._excess(self.times)
        before = excess[busy] + excess  # [W]
        after = self._excess(self.times[busy] - passed / self.speeds[busy])
        after += self._excess(self.times[:, None] + passed / self.speeds[:, None])
        gain = before[:, None] - after
        is_free = self.rows == EMPTY
        gain /= np.where(is_free, 1.0, 2.0)
        same = (mine[:, None, None] == self.rows[None]) & (mine != EMPTY)[:, None, None]  # [R, W, R]
        barred: Bools = same.any(2)[:, :, None] | same.any(0)[None] | ~usable | (mine == EMPTY)[:, None, None]
        barred[:, busy] = True
        if self._domains is not None:
            self._bar_gathering(barred, busy, self._domains)
        # Among equals what moves least work: it leaves most room below the target.
        score = np.where(barred, -np.inf, gain - _NO_GAIN * np.abs(passed))
        slot, other, its_slot = np.unravel_index(int(score.argmax()), score.shape)
        if not score[slot, other, its_slot] > _NO_GAIN * self.ideal:
            return None, 0.0
        expert, gone = int(mine[slot]), int(self.rows[other, its_slot])
        change = [(int(other), expert, gone), (busy, gone, expert)]
        return change, float(gain[slot, other, its_slot])

    def _best_copy(self) -> tuple[list[Seating] | None, float]:
        """Give one of the busiest worker's hottest another copy, in a free slot or for a copy that others have too."""
        busy = int(self.times.argmax())
        width = self.rows.shape[1]
        usable = slots_in_use(self.slots, width)
        can_go: Bools = usable & (
            (self.rows == EMPTY) | (self.copies[self.rows] > 1)
        )  # EMPTY reads the last expert's: masked
        workers, slots = np.nonzero(can_go)
        hottest = [e for e in self.rows[busy][np.argsort(-self.weights[busy], kind="stable")].tolist() if e != EMPTY]
        before = float(self._excess(self.times).sum())
        best: tuple[list[Seating] | None, float] = (None, _NO_GAIN * self.ideal)
        for expert in hottest[:_HOTTEST]:
            holds = (self.rows == expert).any(1)  # [W]
            fits = ~holds[workers]
            if self._domains is not None:  # the first other copy goes to another domain, where there is room in one
                apart = fits & ~np.isin(self._domains[workers], self._domains[holds])
                fits = apart if apart.any() and len(set(self._domains[holds].tolist())) == 1 else fits
            if not fits.any():
                continue
            w, gone = workers[fits], self.rows[workers[fits], slots[fits]]  # [C]
            new = self.loads[expert] / (self.copies[expert] + 1)
            times = np.repeat(self.times[None], len(w), 0)  # [C, W]
            times += np.where(holds, (new - self.per_copy[expert]) / self.speeds, 0.0)
            at = np.arange(len(w))
            times[at, w] += new / self.speeds[w]
            is_taken = gone != EMPTY
            if is_taken.any():
                left = np.append(self.loads / np.maximum(self.copies - 1, 1), 0.0)[gone]  # [C] per copy once it went
                others = (self.rows[None] == gone[:, None, None]).any(2) & is_taken[:, None]  # [C, W]
                others[at, w] = False
                times += np.where(others, ((left - self.per_copy[gone])[:, None]) / self.speeds, 0.0)
                times[at, w] -= np.where(is_taken, self.per_copy[gone], 0.0) / self.speeds[w]
            gains = before - self._excess(times).sum(1)
            at_best = int(gains.argmax())
            if gains[at_best] > best[1]:
                best = ([(int(w[at_best]), expert, int(gone[at_best]))], float(gains[at_best]))
        return best

    def _bar_gathering(self, barred: Bools, busy: int, domains: Ints) -> None:
        """Bar swaps that would bring all copies of an expert into one domain, in place: barred [R, W, R]."""
        for slot, expert in enumerate(self.rows[busy].tolist()):
            if expert != EMPTY and self.copies[expert] > 1:
                others = self._domains_without(expert, busy, domains)
                if len(others) == 1 and int(domains[busy]) not in others:
                    barred[slot, np.isin(domains, list(others))] = True
        for worker, its_slot in np.argwhere((self.rows != EMPTY) & (self.copies[self.rows] > 1)).tolist():
            others = self._domains_without(int(self.rows[worker, its_slot]), worker, domains)
            if others == {int(domains[busy])} and int(domains[worker]) not in others:
                barred[:, worker, its_slot] = True

    def _domains_without(self, expert: int, worker: int, domains: Ints) -> set[int]:
        holds = (self.rows == expert).any(1)
        holds[worker] = False
        return set(domains[holds].tolist())

    def _drop_a_copy(self) -> None:
        """Free a slot of the copy that weighs least among those that others have too."""
        spare = np.where((self.rows != EMPTY) & (self.copies[self.rows] > 1), self.weights, np.inf)
        worker, slot = np.unravel_index(int(spare.argmin()), spare.shape)
        assert np.isfinite(spare[worker, slot]), "with slots for all, a full fleet that lacks an expert has a copy"
        self._seat(int(worker), int(self.rows[worker, slot]), EMPTY)

    def _put(self, worker: int, gone: int, expert: int) -> None:
        row = self.rows[worker]
        row[int(np.flatnonzero(row == gone)[0])] = expert

    def _seat(self, worker: int, gone: int, expert: int) -> None:
        self._put(worker, gone, expert)
        row = self.rows[worker]
        self.rows[worker] = np.concatenate([row[row != EMPTY], row[row == EMPTY]])
        self._weigh()
