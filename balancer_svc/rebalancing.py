"""From load and today's placement to the next one: what the arrays of collegium.balancing mean in a cluster.

Owns the translation: placements to seats and back, members to slots, counts to seconds of work. Pure.
L layers, E experts of a layer, W workers, R slots of the largest worker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from balancer_svc.costs import Costs
from balancer_svc.load_windows import Window
from collegium.balancing.fleet import EMPTY, Fleet, Floats, Ints, max_over_mean
from collegium.balancing.forecast import HALF_LIFE_WINDOWS, forecast
from collegium.balancing.moves import Terms, rebalance
from collegium.balancing.replicated import replicate
from collegium.model.placement import LayerSize, Placement, Worker, fair_shares

_LEAST_CHOICES = 8.0  # of each expert in the mean, over the windows that are kept: fewer say too little


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How far balancing goes.

    target: time of the busiest worker over the mean at which a layer is even enough; spare_share: of a layer's experts,
    how many replicas there may be beside the homes; byte_budget: of one plan, None: no limit; horizon_s: time in which
    a move must pay.
    """

    target: float = 1.05
    spare_share: float = 0.125
    byte_budget: int | None = None
    horizon_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that can be home to experts."""

    worker: Worker
    speed: float = 1.0
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a look at the load came to. placement: None where nothing should move."""

    placement: Placement | None
    decision: str
    num_moves: int = 0
    num_bytes: int = 0
    reasons: tuple[str, ...] = ()


def has_even_layers(layers: Sequence[LayerSize]) -> bool:
    """Whether all layers have as many experts; others are placed by count alone."""
    return len({layer.num_experts for layer in layers}) == 1


def work_of(windows: Sequence[Window], costs: Costs) -> Floats:
    """Give each window's load in seconds of a worker per second, [T, L, E]."""
    return np.stack(
        [(costs.row_s * one.tokens + costs.activation_s * one.activations) / max(one.length_s, 1e-3) for one in windows]
    )


def lacking(windows: Sequence[Window], layers: Sequence[LayerSize]) -> str:
    """Say what is missing before the load can be acted on; nothing where it is enough."""
    if not windows:
        return "no load has been seen yet"
    if not has_even_layers(layers):
        return "layers differ in their number of experts: homes are placed by count"
    if any(window.decode.shape != (len(layers), layers[0].num_experts) for window in windows):
        return "the load that is remembered is of another model"
    seen = min(float(sum(window.tokens.sum(1) for window in windows).min()), math.inf)
    wanted = _LEAST_CHOICES * layers[0].num_experts
    return (
        "" if seen >= wanted else f"{seen:.0f} choices a layer have been seen, {wanted:.0f} are needed to act on them"
    )


def propose(
    layers: Sequence[LayerSize],
    candidates: Sequence[Candidate],
    base: Placement,
    windows: Sequence[Window],
    costs: Costs,
    rules: Rules,
    *,
    epoch: int,
) -> Proposal:
    """Move from the base to a placement over the candidates that is even by load, as far as the rules let it.

    Candidates may differ from the base's workers: homes of those that are gone are given to others whatever it costs.
    If none of the base's workers is a candidate, everything has to be loaded anyway, and the plan starts from nothing.
    """
    ids = tuple(candidate.worker.worker_id for candidate in candidates)
    loads = forecast(work_of(windows, costs))
    fleet = Fleet(
        num_slots=slots_of(layers, [candidate.worker for candidate in candidates], rules.spare_share),
        speeds=np.array([candidate.speed for candidate in candidates]),
        domains=_numbered([candidate.domain for candidate in candidates]),
    )
    expert_bytes = np.array([layer.expert_bytes for layer in layers], np.int64)
    before = to_experts(base, ids, layers)
    if (before == EMPTY).all():
        return _from_nothing(layers, ids, loads, fleet, epoch)
    terms = Terms(
        expert_bytes=expert_bytes,
        # Any budget allows one swap: else experts that are larger than it would never move.
        byte_budget=None if rules.byte_budget is None else max(rules.byte_budget, 2 * int(expert_bytes.max())),
        seconds_per_byte=costs.byte_s,
        horizon_s=rules.horizon_s,
    )
    target = max(rules.target, 1 + _noise(windows, len(ids)))
    outcome = rebalance(before, loads, fleet, target=target, terms=terms)
    was, now = (float(max_over_mean(e, loads, fleet.speeds).mean()) for e in (before, outcome.experts))
    if not outcome.num_moves and set(base.worker_ids) == set(ids):
        why = outcome.reasons[0] if outcome.reasons else f"every layer is at {target:.3g} of the mean or below"
        return Proposal(placement=None, decision=f"nothing to move: {why}", reasons=tuple(outcome.reasons))
    placement = Placement(epoch=epoch, worker_ids=ids, homes=to_homes(outcome.experts, layers[0].num_experts))
    decision = (
        f"{outcome.num_moves} moves, {outcome.num_bytes / 2**20:.1f} MiB: busiest worker {was:.3f} -> {now:.3f} of the "
        "mean over layers"
    )
    return Proposal(
        placement=placement,
        decision=decision,
        num_moves=outcome.num_moves,
        num_bytes=outcome.num_bytes,
        reasons=tuple(outcome.reasons),
    )


def _from_nothing(
    layers: Sequence[LayerSize], ids: tuple[str, ...], loads: Floats, fleet: Fleet, epoch: int
) -> Proposal:
    """Plan as `collegium plan` does by default, where nobody has anything yet."""
    experts = replicate(loads, fleet).experts
    worst = float(max_over_mean(experts, loads, fleet.speeds).mean())
    return Proposal(
        placement=Placement(epoch=epoch, worker_ids=ids, homes=to_homes(experts, layers[0].num_experts)),
        decision=f"planned from nothing: busiest worker {worst:.3f} of the mean over layers",
        num_moves=int((experts != EMPTY).sum()),
        num_bytes=sum(
            int((row != EMPTY).sum()) * layer.expert_bytes for row, layer in zip(experts, layers, strict=True)
        ),
    )


def _noise(windows: Sequence[Window], num_workers: int) -> float:
    """Say how uneven an even load looks, by chance alone, in as many choices as the forecast rests on.

    Choices that fall on W workers alike vary by sqrt(W / n) of the mean; nothing is moved for less than twice that.
    """
    weights = 0.5 ** (np.arange(len(windows) - 1, -1, -1) / HALF_LIFE_WINDOWS)
    choices = np.array([float(window.tokens.sum(1).mean()) for window in windows])
    effective = float((weights * choices).sum() ** 2 / max((weights**2 * choices).sum(), 1e-9))
    return 2.0 * math.sqrt(num_workers / max(effective, 1.0))


def slots_of(layers: Sequence[LayerSize], workers: Sequence[Worker], spare_share: float) -> Ints:
    """Say how many homes of each layer a worker may have: [L, W].

    Shares follow capacities. Replicas get what is left of them beside one home for every expert, up to the spare share.
    """
    total = sum(layer.num_experts * layer.expert_bytes for layer in layers)
    capacity = sum(worker.capacity_bytes or total * (1 + spare_share) for worker in workers)
    spare = max(0.0, min(spare_share, capacity / max(1, total) - 1))
    shares = np.array(fair_shares(workers, math.ceil(total * (1 + spare))))
    slots = np.zeros((len(layers), len(workers)), np.int64)
    owed = np.zeros(len(workers))
    for number, layer in enumerate(layers):
        seats = layer.num_experts + int(layer.num_experts * spare)
        exact = seats * shares
        slots[number] = np.minimum(np.floor(exact + 1e-9), layer.num_experts)
        owed += exact - slots[number]
        while slots[number].sum() < seats and (slots[number] < layer.num_experts).any():
            worker = int(np.where(slots[number] < layer.num_experts, owed, -np.inf).argmax())
            slots[number, worker] += 1
            owed[worker] -= 1
    return slots


def to_experts(placement: Placement, worker_ids: Sequence[str], layers: Sequence[LayerSize]) -> Ints:
    """Lay out a placement over workers, [L, W, R]; homes on others are left out, a base of another shape is empty."""
    experts = np.full((len(layers), len(worker_ids), layers[0].num_experts), EMPTY, np.int64)
    if [len(layer) for layer in placement.homes] != [layer.num_experts for layer in layers]:
        return experts
    index = {worker_id: w for w, worker_id in enumerate(worker_ids)}
    place = [index.get(worker_id, -1) for worker_id in placement.worker_ids]
    widest = 1
    for number, layer in enumerate(placement.homes):
        used = [0] * len(worker_ids)
        for expert, homes in enumerate(layer):
            for w in homes:
                if place[w] >= 0:
                    experts[number, place[w], used[place[w]]] = expert
                    used[place[w]] += 1
        widest = max(widest, *used)
    return experts[:, :, :widest]  # the arithmetic costs the square of the width


def to_homes(experts: Ints, num_experts: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Read seats back as homes[layer][expert] = workers."""
    homes: list[tuple[tuple[int, ...], ...]] = []
    for layer in experts.tolist():
        row: list[list[int]] = [[] for _ in range(num_experts)]
        for w, seated in enumerate(layer):
            for expert in seated:
                if expert != EMPTY:
                    row[expert].append(w)
        homes.append(tuple(tuple(workers) for workers in row))
    return tuple(homes)


def _numbered(names: Sequence[str]) -> Ints:
    known = sorted(set(names))
    return np.array([known.index(name) for name in names], np.int64)
