"""The expert buffer: which experts are in slots, which are on their way, and which go when others come.

Owns residency. A layer's visit leases what is resident and loads the rest; what is not worth a slot, and what prompts
alone ask for, is streamed: loaded, computed and gone. `begin` to `finish` and `hint` belong to the data thread, `warm`
to any other; a lock guards what they share. Nothing leased is ever evicted, and nothing is written back.
Idea: expert buffering, Huang et al., NeurIPS 2024, section 5; streaming and prefetch are ours.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from collegium.buffering.policies import HALF_LIFE_TOKENS, ExpertId, Policy
from collegium.buffering.quotas import Quotas
from collegium.model.device_experts import DeviceSlots
from collegium.model.experts import PackedExpert
from collegium.native.worker_end import Visited
from expert_svc.loading import Load, Loads, Purpose
from expert_svc.residents import Residents
from expert_svc.slots import Slots
from expert_svc.tiers import Tier

_SLOTS_PER_STREAM = 32  # of so many slots one is set apart for streams, up to two: one is computed from while the
_MOST_STREAMS = 2  # other is loaded. Each costs about a point of hits at 24 slots, and is worth little there.
_SLOTS_PER_PREFETCH = 4  # of so many slots one may hold a prefetch, up to:
_MOST_PREFETCHES = 16
_SLOTS_PER_SET_APART = 6  # where loads are slow, of so many slots one is kept free for prefetches: it hides a load of
_SLOW_LOAD_S = 500e-6  # every layer, as a resident it would save one now and then
_ONE_USE = 1 - 0.5 ** (1 / HALF_LIFE_TOKENS)  # what one use adds to an expert's score


@dataclass(slots=True)
class BufferTotals:
    """Counted since the start; requests are hits + misses."""

    hits: int = 0
    misses: int = 0
    adopted: int = 0  # misses for experts without a home here
    evictions: int = 0
    streamed: int = 0  # misses that were not given a slot of their own
    loads: int = 0
    bytes_host: int = 0
    bytes_disk: int = 0
    prefetched: int = 0
    prefetch_useful: int = 0  # prefetched and then used
    prefetch_late: int = 0  # of them, those that rows had to wait for
    prefetch_wasted: int = 0

    @property
    def requests(self) -> int:
        """Experts that visits asked for."""
        return self.hits + self.misses


@dataclass(slots=True)
class Visit:
    """One batch's way through the buffer: its experts by group, and those that it still waits for."""

    layer: int
    experts: Sequence[int]
    slots: list[PackedExpert | None]
    ready: list[int]  # groups whose experts can be computed now and were not given out yet
    missed: list[int] = field(default_factory=list[int])  # experts that had to be loaded
    awaited: dict[ExpertId, int] = field(default_factory=dict[ExpertId, int])  # group by expert, loading
    todo: deque[int] = field(default_factory=deque[int])  # groups that wait for a slot to load into
    streamed: dict[int, PackedExpert] = field(default_factory=dict[int, PackedExpert])  # slots to give back, by group
    is_prompt: list[bool] = field(default_factory=list[bool])  # by group: no decoding row asks for it
    error: Exception | None = None  # of a load that it waited for

    @property
    def is_over(self) -> bool:
        """Whether every group has been given out; not where a load has failed: `landed` has to raise that."""
        return not (self.ready or self.awaited or self.todo or self.error)


class ExpertBuffer:
    """Experts in slots."""

    def __init__(
        self,
        slots: Slots,
        loads: Loads,
        policy: Policy,
        quotas: Quotas,
        *,
        num_experts: Sequence[int],
        can_prefetch: bool = True,
    ):
        """`num_experts` by layer: with as many slots in all, nothing is ever evicted and no policy is asked."""
        self._slots, self._loads, self._policy, self._quotas = slots, loads, policy, quotas
        capacity = slots.capacity
        self.is_roomy = capacity is None or capacity >= sum(num_experts)
        spare = self._max_prefetches = 0
        if capacity is not None and not self.is_roomy:
            spare = max(1, min(_MOST_STREAMS, capacity // _SLOTS_PER_STREAM))
            self._max_prefetches = min(_MOST_PREFETCHES, capacity // _SLOTS_PER_PREFETCH) if can_prefetch else 0
        self.max_resident = None if capacity is None else capacity - spare
        self._num_apart = 0  # of max_resident, slots that are kept free for prefetches
        self.residents = self._resident = Residents(list(num_experts))
        self._num_by_layer = [0] * len(num_experts)
        self._staged: dict[ExpertId, PackedExpert] = {}  # prefetched, landed, not used yet
        self._under_way: dict[ExpertId, Load] = {}
        self._num_given = 0  # residents, and loads that will be
        self._leased: set[ExpertId] = set()
        self._visit: Visit | None = None
        self._homes: frozenset[ExpertId] = frozenset()
        self._lock = threading.Lock()
        self.totals = BufferTotals()
        self.on_visit: Callable[[int, Sequence[int], int], None] | None = None  # (layer, decode experts, hits)
        self.is_prefetching = self._max_prefetches > 0  # the data thread may switch it off and on

    def close(self) -> None:
        """End the loading threads."""
        self._loads.close()

    def on_load(self, tell: Callable[[], None]) -> None:
        """Have `tell` called by the loading thread after each load."""
        self._loads.on_landed = tell

    # --- the data thread ---

    def begin(self, layer: int, experts: Sequence[int], decode_counts: Sequence[int], num_decode_rows: int) -> Visit:
        """Open a layer's visit: lease what is there, and begin to load what is not.

        experts: distinct; decode_counts: how many decoding rows chose each (0: prompts alone did). One visit at a time;
        `finish` ends it.
        """
        assert self._visit is None
        visit = Visit(layer=layer, experts=experts, slots=[None] * len(experts), ready=[])
        with self._lock:
            self._visit = visit
            try:
                self._open(visit, decode_counts, num_decode_rows)
            except BaseException:  # no memory for a slot: the visit ends here, the buffer goes on
                self._end_visit(visit)
                raise
        return visit

    def _open(self, visit: Visit, decode_counts: Sequence[int], num_decode_rows: int) -> None:
        layer, experts = visit.layer, visit.experts
        self._settle()
        resident, missing = self._resident, list[int]()
        for group, expert in enumerate(experts):
            slot = resident.get((layer, expert))
            if slot is None:
                missing.append(group)
            else:
                visit.slots[group] = slot
                visit.ready.append(group)
        if self.is_roomy:
            self.totals.hits += len(visit.ready)
        else:
            self._note(visit, decode_counts, num_decode_rows, missing)
        if missing:
            visit.is_prompt = [not count for count in decode_counts]
            self._fetch(visit, missing)
        if self._staged:
            self._drop_staged(layer)

    def landed(self, visit: Visit) -> list[int]:
        """Take the groups whose experts can be computed now, and were not given out before; begin further loads.

        Raises what a load raised: CheckpointError names the expert. The visit is then to be finished.
        """
        if not (visit.awaited or visit.todo or visit.error):  # nobody but this thread adds to what is ready
            ready, visit.ready = visit.ready, []
            return ready
        with self._lock:
            self._settle()
            if visit.error is not None:
                raise visit.error
            if visit.todo:
                self._start_todo(visit)
            ready, visit.ready = visit.ready, []
        return ready

    def visited(self, visits: Sequence[Visited], num_hits: int) -> None:
        """Hear which resident experts the native end has computed by the table alone, in order; hits are theirs.

        A roomy buffer hears of hits alone.
        """
        with self._lock:
            self.totals.hits += num_hits
            for visit in visits:
                self._tell(visit.layer, visit.experts, visit.decode_counts, visit.num_decode_rows, num_absent=0)
                if self._staged:
                    self._drop_staged(visit.layer)

    def help(self) -> bool:
        """Load an expert that the visit waits for in this thread, where that is as quick. Returns whether it did."""
        return self._loads.can_help and self._loads.help()

    def release(self, visit: Visit, groups: Sequence[int]) -> None:
        """Hear that groups have been computed: what was streamed for them can go, or stay if there is room by now.

        What prompts alone asked for is leased no longer, so a decoding row's expert may take its place.
        """
        if not visit.is_prompt:
            return
        with self._lock:
            self._leased.difference_update((visit.layer, visit.experts[g]) for g in groups if visit.is_prompt[g])
            for group in groups:
                slot = visit.streamed.pop(group, None)
                if slot is None:
                    continue
                is_mixed = any(visit.is_prompt)  # else nothing has changed since it was found not to deserve a slot
                if not is_mixed or visit.is_prompt[group] or not self._claim(visit, group):
                    self._slots.give_back(slot)
                    continue
                self._resident[(visit.layer, visit.experts[group])] = slot
                if visit.experts[group] in visit.missed:
                    self.totals.streamed -= 1

    def finish(self, visit: Visit) -> None:
        """End a visit, whole or not: nothing is leased any more."""
        with self._lock:
            assert self._visit is visit
            self._end_visit(visit)

    def _end_visit(self, visit: Visit) -> None:
        self._visit = None
        self._leased.clear()
        for slot in visit.streamed.values():
            self._slots.give_back(slot)
        visit.streamed.clear()
        visit.todo.clear()
        for expert_id in visit.awaited:  # it failed: what still comes for it is held or dropped as a prefetch is
            load = self._under_way.get(expert_id)
            if load is not None and load.purpose is Purpose.STREAM:
                load.purpose = Purpose.PREFETCH
        visit.awaited.clear()

    def hint(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> int:
        """Hear which experts a coming visit is likely to ask for; begin to load what deserves it.

        Evicts only what is colder than an expert with one more use, as likely as hints have been right. Returns how
        many loads were begun.
        """
        if not self.is_prefetching or not self._max_prefetches:
            return 0
        begun = 0
        with self._lock:
            self._settle()
            for _, expert in sorted(zip(counts, experts, strict=True), key=lambda pair: -pair[0]):
                expert_id = (layer, expert)
                if expert_id in self._resident or expert_id in self._staged or self._is_coming(expert_id):
                    continue
                if self._num_prefetches() >= self._max_prefetches:
                    break
                self._set_apart()
                if self._slots.num_free < 2 and not self._make_way(expert_id):  # one is left for rows that wait
                    continue
                slot = self._slots.take()
                assert slot is not None
                self._load(Load(expert_id, slot, Purpose.PREFETCH), is_urgent=False)
                self.totals.prefetched += 1
                begun += 1
        return begun

    # --- any other thread ---

    def set_homes(self, homes: Iterable[ExpertId]) -> None:
        """Say which experts have a home here: they are the ones to warm, and misses for others are adopted."""
        with self._lock:
            self._homes = frozenset(homes)
            self._policy.set_homes(self._homes)

    def warm(self, experts: Iterable[ExpertId], progress: Callable[[int, int], None] | None = None) -> int:
        """Make experts resident as far as slots go, layers in turn, in this thread; evicts only what has no home here.

        `progress(done, total)` after each. Returns how many are resident. Raises CheckpointError at the first that
        cannot be read.
        """
        wanted = sorted(experts, key=lambda expert_id: (expert_id[1], expert_id[0]))
        total = len(wanted) if self.max_resident is None else min(len(wanted), self.max_resident)
        for done, expert_id in enumerate(wanted[:total], 1):
            load = self._reserve(expert_id)
            if load is not None:
                self._loads.load_here(load)
                with self._lock:
                    self._settle()
                if load.error is not None:
                    raise load.error
            if progress is not None:
                progress(done, total)
        return sum(expert_id in self._resident for expert_id in wanted)

    def holds_others(self, kept: Iterable[ExpertId]) -> bool:
        """Whether `release_others` would let go of anything."""
        kept = set(kept)
        return self.max_resident is None and any(expert_id not in kept for expert_id in self._resident.copy())

    def release_others(self, kept: Iterable[ExpertId]) -> int:
        """Without a budget: let go of every expert that is not in `kept`. With one, residency is the policy's alone."""
        if self.max_resident is not None:
            return 0
        kept = set(kept)
        with self._lock:
            gone = [expert_id for expert_id in self._resident if expert_id not in kept]
            slots = [self._resident[expert_id] for expert_id in gone]
            for expert_id in gone:
                self._resident.remove(expert_id)
                self._ungive(expert_id)
        self._resident.wait_unleased(gone)
        with self._lock:
            for slot in slots:
                self._slots.give_back(slot)
        return len(gone)

    @property
    def can_prefetch(self) -> bool:
        """Whether hints are of any use."""
        return self._max_prefetches > 0

    def is_resident(self, expert_id: ExpertId) -> bool:
        """Whether an expert is in a slot now."""
        return expert_id in self._resident

    def residency(self) -> Mapping[int, list[int]]:
        """List resident experts by layer, rising."""
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(self._resident.copy()):
            layers.setdefault(layer, []).append(expert)
        return layers

    @property
    def num_resident(self) -> int:
        """Experts in slots."""
        return len(self._resident)

    @property
    def slab(self) -> DeviceSlots | None:
        """The slots' memory, where it is a device's."""
        return self._slots.slab

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert, in the kernel's form."""
        return self._slots.slot_bytes

    @property
    def load_seconds(self) -> float:
        """Time that loads took so far, added up over threads."""
        return self._loads.total_s

    @property
    def budget_bytes(self) -> int:
        """Bytes of all slots; 0 without a budget."""
        return (self._slots.capacity or 0) * self._slots.slot_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of their weights, in the kernel's form."""
        return len(self._resident) * self._slots.slot_bytes

    # --- under the lock ---

    def _note(self, visit: Visit, decode_counts: Sequence[int], num_decode_rows: int, missing: list[int]) -> None:
        # Tell the policy of the decoding rows; a prompt's rows pass by unheard, or they would displace what decodes.
        layer, experts = visit.layer, visit.experts
        self.totals.hits += len(visit.ready)
        self._leased.update((layer, experts[group]) for group in visit.ready)
        num_absent = sum(1 for group in missing if decode_counts[group])
        self._tell(layer, experts, decode_counts, num_decode_rows, num_absent)

    def _tell(
        self, layer: int, experts: Sequence[int], decode_counts: Sequence[int], num_decode_rows: int, num_absent: int
    ) -> None:
        if not num_decode_rows:
            return
        if all(decode_counts):
            of_decode, counts = experts, decode_counts
        else:
            chosen = [(expert, count) for expert, count in zip(experts, decode_counts, strict=True) if count]
            of_decode, counts = [expert for expert, _ in chosen], [count for _, count in chosen]
        self._policy.visit(layer, of_decode, counts, num_decode_rows)
        self._quotas.visit(layer, of_decode, counts, num_decode_rows)
        if self.on_visit is not None:
            self.on_visit(layer, of_decode, len(of_decode) - num_absent)

    def _fetch(self, visit: Visit, missing: list[int]) -> None:
        layer = visit.layer
        if len(missing) > 1 and not self.is_roomy:  # where there is not room for all, it goes to those most used
            missing.sort(key=lambda group: -self._policy.score((layer, visit.experts[group])))
        for group in missing:
            expert_id = (layer, visit.experts[group])
            slot = self._staged.pop(expert_id, None)
            if slot is not None:  # prefetched, and here in time
                self.totals.hits += 1
                self.totals.prefetch_useful += 1
                visit.slots[group] = slot
                visit.ready.append(group)
                if self._claim(visit, group):
                    self._resident[expert_id] = slot
                else:
                    visit.streamed[group] = slot
                continue
            self.totals.misses += 1
            visit.missed.append(visit.experts[group])
            if expert_id not in self._homes:
                self.totals.adopted += 1
            load = self._under_way.get(expert_id)
            if load is None:
                visit.todo.append(group)
                continue
            visit.awaited[expert_id] = group
            self._loads.hasten(load)
            if load.purpose is Purpose.PREFETCH:
                self.totals.prefetch_useful += 1
                self.totals.prefetch_late += 1
                load.purpose = Purpose.RESIDENT if self._claim(visit, group) else Purpose.STREAM
            elif load.purpose is Purpose.RESIDENT:
                self._leased.add(expert_id)
        self._withdraw(layer, visit)
        self._start_todo(visit)

    def _start_todo(self, visit: Visit) -> None:
        while visit.todo:
            group = visit.todo[0]
            expert_id = (visit.layer, visit.experts[group])
            stays = self._claim(visit, group)
            slot = None
            try:
                slot = self._slots.take() or self._rob_prefetch()
            finally:
                if slot is None and stays:
                    self._ungive(expert_id)
                    self._leased.discard(expert_id)
            if slot is None:  # all are leased, or being computed from: when one is free, this goes on
                break
            visit.todo.popleft()
            visit.awaited[expert_id] = group
            self._load(Load(expert_id, slot, Purpose.RESIDENT if stays else Purpose.STREAM), is_urgent=True)
        self._loads.wake(len(visit.awaited), has_other_work=bool(visit.ready))

    def _claim(self, visit: Visit, group: int) -> bool:
        """Find room among the residents for a group's expert, evicting another if it is worth that."""
        expert_id = (visit.layer, visit.experts[group])
        apart = self._num_apart if self.is_prefetching else 0
        if self.max_resident is not None and self._num_given >= self.max_resident - apart:
            if visit.is_prompt[group]:
                return False
            layer = self._quotas.layer_to_shrink(visit.layer, self._num_by_layer)
            victim = self._policy.victim(layer, self._leased)
            if victim is None or victim not in self._resident or not self._policy.is_worth(expert_id, victim):
                return False
            self._remove(victim)
            self.totals.evictions += 1
        self._give(expert_id)
        self._leased.add(expert_id)
        return True

    def _give(self, expert_id: ExpertId) -> None:
        self._num_given += 1
        if not self.is_roomy:
            self._num_by_layer[expert_id[0]] += 1
            self._policy.admit(expert_id)

    def _ungive(self, expert_id: ExpertId) -> None:
        self._num_given -= 1
        if not self.is_roomy:
            self._num_by_layer[expert_id[0]] -= 1
            self._policy.evict(expert_id)

    def _remove(self, expert_id: ExpertId) -> None:
        self._slots.give_back(self._resident.remove(expert_id))
        self._ungive(expert_id)

    def _load(self, load: Load, *, is_urgent: bool) -> None:
        self._under_way[load.expert_id] = load
        self._loads.submit(load, is_urgent=is_urgent)

    def _settle(self) -> None:
        """Put every load that has ended where it belongs."""
        for load in self._loads.ended():
            self._end(load)

    def _end(self, load: Load) -> None:
        expert_id, slot, visit = load.expert_id, load.slot, self._visit
        del self._under_way[expert_id]
        group = visit.awaited.get(expert_id) if visit is not None else None
        if load.error is not None:
            self._slots.give_back(slot)
            if load.purpose is Purpose.RESIDENT:
                self._ungive(expert_id)
            if visit is not None and group is not None:
                visit.error = visit.error or load.error
                del visit.awaited[expert_id]
            return
        self.totals.loads += 1
        if load.tier is Tier.DISK:
            self.totals.bytes_disk += slot.num_bytes
        else:
            self.totals.bytes_host += slot.num_bytes
        if load.purpose is Purpose.RESIDENT:
            self._resident[expert_id] = slot
        elif load.purpose is Purpose.PREFETCH:
            self._staged[expert_id] = slot
        if visit is not None and group is not None:
            visit.slots[group] = slot
            if load.purpose is Purpose.STREAM:
                self.totals.streamed += 1
                visit.streamed[group] = slot
            visit.ready.append(group)
            del visit.awaited[expert_id]  # last: whether the visit is over is asked without the lock

    def _is_coming(self, expert_id: ExpertId) -> bool:
        """Whether an expert is on its way, or will be as soon as the visit finds a slot for it."""
        visit = self._visit
        if expert_id in self._under_way or visit is None or not visit.todo or visit.layer != expert_id[0]:
            return expert_id in self._under_way
        return any(visit.experts[group] == expert_id[1] for group in visit.todo)

    def _reserve(self, expert_id: ExpertId) -> Load | None:
        """Find a slot to warm an expert in; None where it is there, or on its way, or there is none."""
        with self._lock:
            self._settle()
            if expert_id in self._resident or self._is_coming(expert_id):
                return None
            stranger = None if self._has_room() else self._stranger()
            if stranger is None:
                return self._reserve_in_room(expert_id)
            slot = self._resident.remove(stranger)
            self._ungive(stranger)
            self.totals.evictions += 1
        self._resident.wait_unleased([stranger])
        with self._lock:
            self._slots.give_back(slot)
            self._settle()
            if expert_id in self._resident or self._is_coming(expert_id):
                return None
            return self._reserve_in_room(expert_id)

    def _has_room(self) -> bool:
        return self.max_resident is None or self._num_given < self.max_resident

    def _stranger(self) -> ExpertId | None:
        """Find a resident that has no home here and is not in use."""
        return next((e for e in self._resident if e not in self._homes and e not in self._leased), None)

    def _reserve_in_room(self, expert_id: ExpertId) -> Load | None:
        if not self._has_room():
            return None
        slot = self._staged.pop(expert_id, None)
        if slot is not None:
            self._give(expert_id)
            self._resident[expert_id] = slot
            return None
        slot = self._slots.take() or self._rob_prefetch()
        if slot is None:
            return None
        self._give(expert_id)
        load = Load(expert_id, slot, Purpose.RESIDENT)
        self._under_way[expert_id] = load
        return load

    # --- prefetches, under the lock ---

    def _set_apart(self) -> None:
        """Keep slots free for prefetches where loads are slow, and give them back where they are not."""
        assert self._slots.capacity is not None and self.max_resident is not None
        is_slow = self._loads.mean_s > _SLOW_LOAD_S
        self._num_apart = self._slots.capacity // _SLOTS_PER_SET_APART if is_slow else 0
        while self._num_given > self.max_resident - self._num_apart:
            victim = self._policy.victim(None, self._leased)
            if victim is None or victim not in self._resident:
                return
            self._remove(victim)
            self.totals.evictions += 1

    def _make_way(self, expert_id: ExpertId) -> bool:
        """Evict a resident that is colder than a prefetch would make it. Returns whether there was one."""
        totals = self.totals
        trust = (totals.prefetch_useful + 1) / (totals.prefetch_useful + totals.prefetch_wasted + 2)
        layer = self._quotas.layer_to_shrink(expert_id[0], self._num_by_layer) if self._num_given else None
        victim = self._policy.victim(layer, self._leased)
        if victim is None or victim not in self._resident:
            return False
        if self._policy.score(victim) >= self._policy.score(expert_id) + trust * _ONE_USE:
            return False
        self._remove(victim)
        self.totals.evictions += 1
        return True

    def _num_prefetches(self) -> int:
        return len(self._staged) + sum(load.purpose is Purpose.PREFETCH for load in self._under_way.values())

    def _rob_prefetch(self) -> PackedExpert | None:
        """Take the slot of a prefetch for rows that wait now."""
        if self._staged:
            expert_id = next(iter(self._staged))
            self.totals.prefetch_wasted += 1
            return self._staged.pop(expert_id)
        for load in self._under_way.values():
            if load.purpose is Purpose.PREFETCH and self._loads.withdraw(load):
                del self._under_way[load.expert_id]
                return load.slot
        return None

    def _withdraw(self, layer: int, visit: Visit) -> None:
        """Take back prefetches for this layer that have not begun and that it does not ask for."""
        for load in list(self._under_way.values()):
            if (
                load.purpose is Purpose.PREFETCH
                and load.expert_id[0] == layer
                and load.expert_id not in visit.awaited
                and self._loads.withdraw(load)
            ):
                del self._under_way[load.expert_id]
                self._slots.give_back(load.slot)

    def _drop_staged(self, layer: int) -> None:
        """Let go of prefetches for a layer whose visit did not ask for them."""
        for expert_id in [e for e in self._staged if e[0] == layer]:
            self._slots.give_back(self._staged.pop(expert_id))
            self.totals.prefetch_wasted += 1
