"""Play a trace through a buffer of a given size: hits, misses and bytes of a policy.

Owns the rules of a replay and the accounts. What a visit needs is spared while it lasts. Hits come first; then misses
take their room from victims of the policy, those with the best score first, or as recorded where it has no scores. A
miss for which there is no room is streamed: read, used, and not kept. L layers that have experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from collegium.buffering.policies import Policy
from collegium.buffering.quotas import Quotas
from collegium.buffering.ranked import ExpertId
from collegium.buffering.visits import Visit

_REPORT_EVERY = 1024  # visits


class Scope(StrEnum):
    """From where an insertion takes its room."""

    LAYER = "layer"  # from its own layer, which has a share of its own
    POOL = "pool"  # from anywhere
    QUOTA = "quota"  # from the layer furthest above its soft quota


class PrefillRule(StrEnum):
    """What a miss of prefill does."""

    INSERT = "insert"  # as decode does
    STREAM = "stream"  # takes free room only: evicts nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The room of a buffer. sizes: [L] bytes of one expert; room: [L] bytes for Scope.LAYER, otherwise one number."""

    scope: Scope
    sizes: tuple[int, ...]
    num_experts: int
    room: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a replay counted. A request is an expert of a visit."""

    prefill_requests: int
    prefill_hits: int
    decode_requests: int
    decode_hits: int
    bytes_read: int
    num_inserted: int
    num_streamed: int
    most_bytes: int  # the most that was resident at any time

    @property
    def num_misses(self) -> int:
        """Give the misses of both phases."""
        return self.num_inserted + self.num_streamed

    @property
    def hit_rate_decode(self) -> float:
        """Give the share of decode requests that were hits."""
        return self.decode_hits / self.decode_requests if self.decode_requests else 0.0


def capacity_of_percent(scope: Scope, sizes: Sequence[int], num_experts: int, percent: float) -> Capacity:
    """Make room for a share of the experts: of each layer, or of all bytes. Rounds down, but to one slot at least."""
    if scope is Scope.LAYER:
        slots = max(1, int(num_experts * percent / 100 + 1e-9))
        room = tuple(slots * size for size in sizes)
    else:
        room = (max(max(sizes), int(num_experts * sum(sizes) * percent / 100 + 1e-6)),)
    return Capacity(scope=scope, sizes=tuple(sizes), num_experts=num_experts, room=room)


def capacity_of_bytes(scope: Scope, sizes: Sequence[int], num_experts: int, num_bytes: int) -> Capacity:
    """Make room of so many bytes, split evenly for Scope.LAYER. ValueError where an expert does not fit."""
    room = (num_bytes // len(sizes),) * len(sizes) if scope is Scope.LAYER else (num_bytes,)
    least = max(sizes) * (len(sizes) if scope is Scope.LAYER else 1)
    if num_bytes < least:
        raise ValueError(
            f"{num_bytes} bytes are too few: scope {scope} needs {least} for one slot of the largest expert"
        )
    return Capacity(scope=scope, sizes=tuple(sizes), num_experts=num_experts, room=room)


def replay(
    visits: Sequence[Visit],
    policy: Policy,
    capacity: Capacity,
    *,
    prefill: PrefillRule = PrefillRule.INSERT,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Play visits through a buffer that begins empty. progress is told now and then how many visits are done."""
    buffer = _Buffer(policy, capacity)
    requests, hits = [0, 0], [0, 0]  # of prefill, of decode
    bytes_read = num_inserted = num_streamed = 0
    for at, visit in enumerate(visits):
        layer = visit.layer
        policy.visit(layer, visit.experts, visit.counts, visit.num_tokens)
        buffer.visit(visit)
        missed = [index for index in visit.experts if (layer, index) not in buffer.residents]
        requests[visit.is_decode] += len(visit.experts)
        hits[visit.is_decode] += len(visit.experts) - len(missed)
        bytes_read += len(missed) * capacity.sizes[layer]
        spared = {(layer, index) for index in visit.experts} if missed else ()
        missed.sort(key=lambda index: -policy.score((layer, index)))
        may_evict = visit.is_decode or prefill is PrefillRule.INSERT
        for index in missed:
            if buffer.make_room((layer, index), spared, may_evict):
                buffer.admit((layer, index))
                num_inserted += 1
            else:
                num_streamed += 1
        if progress is not None and at % _REPORT_EVERY == 0:
            progress(at)
    return Result(
        prefill_requests=requests[0],
        prefill_hits=hits[0],
        decode_requests=requests[1],
        decode_hits=hits[1],
        bytes_read=bytes_read,
        num_inserted=num_inserted,
        num_streamed=num_streamed,
        most_bytes=buffer.most_bytes,
    )


class _Buffer:
    """The residents of a replay and the bytes that are free, by layer or for all."""

    def __init__(self, policy: Policy, capacity: Capacity) -> None:
        self._policy = policy
        self._scope = capacity.scope
        self._sizes = capacity.sizes
        self._free = list(capacity.room)
        self._held_bytes = 0
        self._num_resident = [0] * len(capacity.sizes)
        self._quotas: Quotas | None = None
        if capacity.scope is Scope.QUOTA:
            num_slots = capacity.room[0] * len(capacity.sizes) // sum(capacity.sizes)
            self._quotas = Quotas(len(capacity.sizes), capacity.num_experts, num_slots)
        self.residents: set[ExpertId] = set()
        self.most_bytes = 0

    def visit(self, visit: Visit) -> None:
        if self._quotas is not None and visit.is_decode:
            self._quotas.visit(visit.layer, visit.experts, visit.counts, visit.num_tokens)

    def make_room(self, expert_id: ExpertId, spared: set[ExpertId] | tuple[()], may_evict: bool) -> bool:
        """Evict until an expert fits; False where it has to be streamed."""
        layer = expert_id[0]
        at = layer if self._scope is Scope.LAYER else 0
        while self._free[at] < self._sizes[layer]:
            victim = self._victim(layer, spared) if may_evict else None
            if victim is None or not self._policy.is_worth(expert_id, victim):
                return False
            self._policy.evict(victim)
            self.residents.remove(victim)
            self._num_resident[victim[0]] -= 1
            self._held_bytes -= self._sizes[victim[0]]
            self._free[at] += self._sizes[victim[0]]
        return True

    def admit(self, expert_id: ExpertId) -> None:
        layer = expert_id[0]
        self._policy.admit(expert_id)
        self.residents.add(expert_id)
        self._num_resident[layer] += 1
        self._free[layer if self._scope is Scope.LAYER else 0] -= self._sizes[layer]
        self._held_bytes += self._sizes[layer]
        self.most_bytes = max(self.most_bytes, self._held_bytes)

    def _victim(self, layer: int, spared: set[ExpertId] | tuple[()]) -> ExpertId | None:
        if self._scope is Scope.LAYER:
            return self._policy.victim(layer, spared)
        if self._quotas is not None:
            # Where a layer that holds its quota needs more at once, the rest streams: other layers keep theirs.
            return self._policy.victim(self._quotas.layer_to_shrink(layer, self._num_resident), spared)
        return self._policy.victim(None, spared)
