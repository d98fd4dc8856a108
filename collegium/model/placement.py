"""Give every expert a home: even by bytes, stable under change, a pure function of its arguments.

Owns Placement and the first plan (one home per expert). Knows nothing of leases, of loads or of what is resident: a
home is advice, never a limit. L layers, E experts of a layer, W workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """The experts of one MoE layer: how many, and the bytes of each."""

    num_experts: int
    expert_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that can be given homes; capacity_bytes 0 means no limit."""

    worker_id: str
    capacity_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which workers are home to which experts, immutable under its epoch.

    homes[layer][expert] are indices into worker_ids; never empty where worker_ids is not.
    """

    epoch: int
    worker_ids: tuple[str, ...]
    homes: tuple[tuple[tuple[int, ...], ...], ...]

    def workers_of(self, layer: int, expert: int) -> tuple[str, ...]:
        """Give the ids of an expert's homes."""
        return tuple(self.worker_ids[w] for w in self.homes[layer][expert])

    def experts_of(self, worker_id: str) -> list[tuple[int, int]]:
        """List the (layer, expert) that have a home on a worker, in order; empty for one that is not named."""
        if worker_id not in self.worker_ids:
            return []
        w = self.worker_ids.index(worker_id)
        return [(i, e) for i, layer in enumerate(self.homes) for e, homes in enumerate(layer) if w in homes]

    def num_homes(self) -> dict[str, int]:
        """Count homes by worker id."""
        counts = dict.fromkeys(self.worker_ids, 0)
        for layer in self.homes:
            for homes in layer:
                for w in homes:
                    counts[self.worker_ids[w]] += 1
        return counts

    def has_shape(self, layers: Sequence[LayerSize]) -> bool:
        """Whether it lists the experts of these layers; False for an empty placement."""
        return bool(self.worker_ids) and [len(layer) for layer in self.homes] == [one.num_experts for one in layers]

    def renamed(self, names: Mapping[str, str]) -> Placement:
        """Give the same placement with some worker ids replaced."""
        ids = tuple(names.get(worker_id, worker_id) for worker_id in self.worker_ids)
        return Placement(epoch=self.epoch, worker_ids=ids, homes=self.homes)


NO_PLACEMENT = Placement(epoch=0, worker_ids=(), homes=())


def plan_homes(
    layers: Sequence[LayerSize], workers: Sequence[Worker], base: Placement = NO_PLACEMENT, *, epoch: int = 1
) -> Placement:
    """Plan one home per expert, starting from what the base says of workers that are still there.

    Per layer the workers' counts differ by at most one, and so do the totals by the bytes of one expert, where
    capacities allow; capacities that bind share the bytes in proportion. Experts move only where evenness asks for it.
    A base of another shape counts as none. ValueError without workers or with repeated ids.
    """
    ids = tuple(worker.worker_id for worker in workers)
    if not ids:
        raise ValueError("workers: at least one is needed")
    if len(set(ids)) != len(ids):
        raise ValueError(f"workers: ids repeat: {ids}")
    share = fair_shares(workers, sum(layer.num_experts * layer.expert_bytes for layer in layers))
    held = _kept(layers, ids, base)  # [L][W] sets of experts
    quotas = _quotas(layers, share, [[len(experts) for experts in row] for row in held])
    _level(quotas, layers, share)
    homes: list[tuple[tuple[int, ...], ...]] = []
    for layer, row, quota in zip(layers, held, quotas, strict=True):
        homes.append(_fill(layer.num_experts, row, quota))
    return Placement(epoch=epoch, worker_ids=ids, homes=tuple(homes))


def fair_shares(workers: Sequence[Worker], total_bytes: int) -> list[float]:
    """Share out bytes over workers: equal shares of 1, but none above a capacity while another worker has room."""
    caps = [worker.capacity_bytes or total_bytes for worker in workers]
    if sum(caps) <= total_bytes:
        return [cap / max(1, sum(caps)) for cap in caps]
    # Fill the smallest first: what it cannot take is shared by the others.
    share, left, order = [0.0] * len(caps), float(total_bytes), sorted(range(len(caps)), key=lambda w: caps[w])
    for i, w in enumerate(order):
        given = min(float(caps[w]), left / (len(order) - i))
        share[w], left = given / max(1, total_bytes), left - given
    return share


def _kept(layers: Sequence[LayerSize], ids: tuple[str, ...], base: Placement) -> list[list[set[int]]]:
    # What every worker keeps of the base: the first home that is still there, so that a replica becomes the home.
    held: list[list[set[int]]] = [[set() for _ in ids] for _ in layers]
    if [len(layer) for layer in base.homes] != [layer.num_experts for layer in layers]:
        return held
    index = {worker_id: w for w, worker_id in enumerate(ids)}
    for row, layer in zip(held, base.homes, strict=True):
        for expert, homes in enumerate(layer):
            alive = [index[base.worker_ids[w]] for w in homes if base.worker_ids[w] in index]
            if alive:
                row[alive[0]].add(expert)
    return held


def _quotas(layers: Sequence[LayerSize], share: list[float], counts: list[list[int]]) -> list[list[int]]:
    # [L][W] number of experts. A worker gets the whole part of its share of a layer; what is left over goes by one to
    # those who hold it already, then to those who are furthest below their share of all bytes.
    deficit = [0.0] * len(share)
    quotas: list[list[int]] = []
    for layer, row in zip(layers, counts, strict=True):
        exact = [layer.num_experts * part for part in share]
        quota = [int(value + 1e-9) for value in exact]
        order = sorted(
            (w for w in range(len(share)) if share[w] > 0),
            key=lambda w: (row[w] <= quota[w], -(deficit[w] + (exact[w] - quota[w]) * layer.expert_bytes), w),
        )
        for w in order[: layer.num_experts - sum(quota)]:
            quota[w] += 1
        for w, value in enumerate(exact):
            deficit[w] += (value - quota[w]) * layer.expert_bytes
        quotas.append(quota)
    return quotas


def _level(quotas: list[list[int]], layers: Sequence[LayerSize], share: list[float]) -> None:
    # Keeping what is held may favour the same worker in every layer: hand single experts from the worker that is most
    # above its share of all bytes to the one most below, while that brings both nearer to it. Mutates quotas.
    total = sum(layer.num_experts * layer.expert_bytes for layer in layers)
    excess = [
        sum(row[w] * layer.expert_bytes for row, layer in zip(quotas, layers, strict=True)) - part * total
        for w, part in enumerate(share)
    ]
    floors = [[int(layer.num_experts * part + 1e-9) for part in share] for layer in layers]
    while True:
        best: tuple[float, int, int, int] | None = None
        for i, layer in enumerate(layers):
            givers = [w for w in range(len(share)) if quotas[i][w] > floors[i][w]]
            takers = [w for w in range(len(share)) if quotas[i][w] <= floors[i][w] and share[w] > 0]
            if not givers or not takers:
                continue
            giver = max(givers, key=lambda w: (excess[w], -w))
            taker = min(takers, key=lambda w: (excess[w], w))
            gain = excess[giver] - excess[taker] - layer.expert_bytes
            if gain > 1e-6 * layer.expert_bytes and (best is None or gain > best[0]):
                best = (gain, i, giver, taker)
        if best is None:
            return
        _, i, giver, taker = best
        quotas[i][giver] -= 1
        quotas[i][taker] += 1
        excess[giver] -= layers[i].expert_bytes
        excess[taker] += layers[i].expert_bytes


def _fill(num_experts: int, held: list[set[int]], quota: list[int]) -> tuple[tuple[int, ...], ...]:
    # Workers keep their lowest experts up to their quota; the rest go in order to those who have room.
    home = [-1] * num_experts
    for w, experts in enumerate(held):
        for expert in sorted(experts)[: quota[w]]:
            home[expert] = w
    room = [number - home.count(w) for w, number in enumerate(quota)]
    for expert in range(num_experts):
        if home[expert] < 0:
            w = max(range(len(room)), key=lambda candidate: (room[candidate], -candidate))
            home[expert], room[w] = w, room[w] - 1
    return tuple((w,) for w in home)
