"""An expert buffer with a source, slots and threads that tests can see into.

Owns Rig. The source writes a mark of the expert all over the slot, and a slot that is given back is painted over: one
that holds its mark was copied into since.
"""

import ctypes
import threading
from collections.abc import Callable, Collection, Sequence

import torch

from collegium.buffering.policies import ExpertId, make_policy
from collegium.buffering.quotas import Quotas
from collegium.model.architectures import Activation, CheckpointError, ExpertForm, Layout
from collegium.model.experts import PackedExpert
from collegium.model.manifest import Manifest
from expert_svc.buffer import BufferTotals, ExpertBuffer, Visit
from expert_svc.loading import Load, Loads
from expert_svc.slots import Slots
from expert_svc.tiers import Tier

NUM_LAYERS, NUM_EXPERTS = 4, 12
ALL = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
MANIFEST = Manifest(
    model_dir="",
    model_type="",
    layout=Layout.PER_EXPERT,
    form=ExpertForm(activation=Activation.SILU),
    d_model=16,
    d_ffn=8,
    top_k=2,
    dtype="float32",
    layers=(),
    files={},
    sources={},
    stored_dtypes={},
)
PAINT = 0xEE


def mark_of(expert_id: ExpertId) -> int:
    """The byte that an expert's slot is full of."""
    return 1 + expert_id[0] * NUM_EXPERTS + expert_id[1]


def write(slot: PackedExpert, byte: int) -> None:
    """Fill a slot."""
    memory = ctypes.create_string_buffer(bytes([byte]) * slot.num_bytes, slot.num_bytes)
    slot.copy_from(ctypes.addressof(memory))


def bytes_in(slot: PackedExpert) -> set[int]:
    """The different bytes in a slot."""
    memory = ctypes.create_string_buffer(slot.num_bytes)
    slot.copy_to(ctypes.addressof(memory))
    return set(memory.raw)


class Marks:
    """A source that marks slots, and fails once for each expert in `failing`."""

    def __init__(self) -> None:
        self.fills: list[ExpertId] = []
        self.failing: set[ExpertId] = set()
        self.error: Exception | None = None  # what is raised for them instead of a CheckpointError
        self.is_resident: Callable[[ExpertId], bool] = lambda _: False
        self.during: Callable[[ExpertId], None] = lambda _: None
        self.wrong: list[str] = []
        self._now: set[ExpertId] = set()
        self._lock = threading.Lock()

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        with self._lock:
            if expert_id in self._now or self.is_resident(expert_id):
                self.wrong.append(f"{expert_id} was loaded twice")
            self._now.add(expert_id)
            self.fills.append(expert_id)
            is_failing = expert_id in self.failing
            self.failing.discard(expert_id)
        self.during(expert_id)
        write(slot, PAINT if is_failing else mark_of(expert_id))
        with self._lock:
            self._now.discard(expert_id)
        if is_failing:
            raise self.error or CheckpointError(f"expert {expert_id[1]} of MoE layer {expert_id[0]} is damaged")
        return Tier.HOST


class WatchedSlots(Slots):
    """Slots that know which are out, and paint over what comes back."""

    def __init__(self, num_slots: int | None):
        super().__init__(MANIFEST, torch.float32, num_slots=num_slots)
        self.out: set[PackedExpert] = set()
        self.most_out = 0

    def take(self) -> PackedExpert | None:
        slot = super().take()
        if slot is not None:
            assert slot not in self.out
            self.out.add(slot)
            self.most_out = max(self.most_out, len(self.out))
        return slot

    def give_back(self, slot: PackedExpert) -> None:
        self.out.remove(slot)  # KeyError: given back twice
        if self.capacity is not None:
            write(slot, PAINT)
        super().give_back(slot)


class SteppedLoads(Loads):
    """Loads of a thread that takes a step when it is told to, and that take as long as a test says."""

    def __init__(self, source: Marks):
        self.pace_s = 0.0
        super().__init__(source, num_threads=0)
        self.begun: list[Load] = []

    @property
    def mean_s(self) -> float:  # type: ignore[override]
        return self.pace_s

    @mean_s.setter
    def mean_s(self, measured_s: float) -> None:
        pass

    @property
    def num_waiting(self) -> int:
        return len(self._urgent) + len(self._others)

    @property
    def num_urgent(self) -> int:
        return len(self._urgent)

    @property
    def unfinished(self) -> list[Load]:
        return [*self._urgent, *self._others, *self.begun]

    def begin_next(self) -> Load:
        load = (self._urgent or self._others).popleft()
        self.begun.append(load)
        return load

    def land(self, at: int = 0) -> None:
        self._load(self.begun.pop(at))
        self.on_landed()


class Rig:
    """A buffer with everything around it."""

    def __init__(
        self,
        capacity: int | None,
        policy: str = "lru",
        *,
        can_prefetch: bool = True,
        num_threads: int | None = None,
    ):
        """`num_threads` None: loads are stepped by hand."""
        self.source, self.slots = Marks(), WatchedSlots(capacity)
        self.can_prefetch = can_prefetch and capacity is not None
        self.stepped = SteppedLoads(self.source)
        self.loads = self.stepped if num_threads is None else Loads(self.source, num_threads=num_threads)
        self.buffer = ExpertBuffer(
            self.slots,
            self.loads,
            make_policy(policy, is_selective=True),
            Quotas(NUM_LAYERS, NUM_EXPERTS, capacity or len(ALL)),
            num_experts=[NUM_EXPERTS] * NUM_LAYERS,
            can_prefetch=can_prefetch,
        )
        self.source.is_resident = self.buffer.is_resident
        self.has_landed = threading.Event()
        self.buffer.on_load(self.has_landed.set)
        self.num_requests = 0

    @property
    def totals(self) -> BufferTotals:
        """What the buffer counted."""
        return self.buffer.totals

    def begin(self, layer: int, experts: Sequence[int], decode: Collection[int] | None = None) -> Visit:
        """Open a visit in which the experts in `decode` (None: all) are asked for by decoding rows."""
        self.num_requests += len(experts)
        counts = [int(decode is None or expert in decode) for expert in experts]
        return self.buffer.begin(layer, experts, counts, int(any(counts)))

    def serve(self, layer: int, experts: Sequence[int], decode: Collection[int] | None = None) -> Visit:
        """Do a whole visit as the worker's data thread does, and look at every slot that is handed out."""
        visit, given = self.begin(layer, experts, decode), list[int]()
        try:
            while not visit.is_over:
                self.has_landed.clear()
                if groups := self.buffer.landed(visit):
                    given += groups
                    self.check(visit, groups)
                    self.buffer.release(visit, groups)
                elif not visit.is_over and not self.buffer.help():
                    assert self.has_landed.wait(20), "a load that is waited for never lands"
        finally:
            self.buffer.finish(visit)
        assert sorted(given) == list(range(len(experts)))
        return visit

    def check(self, visit: Visit, groups: Sequence[int]) -> None:
        """See that groups' slots hold their marks."""
        for group in groups:
            slot = visit.slots[group]
            assert slot is not None
            assert bytes_in(slot) == {mark_of((visit.layer, visit.experts[group]))}

    def hint(self, layer: int, *experts: int) -> int:
        return self.buffer.hint(layer, experts, [1] * len(experts))

    def step_all(self) -> None:
        """Let the stepped thread do everything that waits."""
        while self.stepped.num_waiting:
            self.stepped.begin_next()
        while self.stepped.begun:
            self.stepped.land()

    def settle(self) -> None:
        """Have what has landed put where it belongs."""
        self.buffer.warm(list(self.residents())[:1])

    def residents(self) -> set[ExpertId]:
        return {(layer, expert) for layer, experts in self.buffer.residency().items() for expert in experts}

    def check_end(self) -> None:
        """See that nothing is lost once everything has ended."""
        if self.loads is self.stepped:
            self.step_all()
        else:  # a visit of everything waits for everything that is under way
            for layer in range(NUM_LAYERS):
                self.serve(layer, range(NUM_EXPERTS), decode=())
        for layer in range(NUM_LAYERS):
            self.serve(layer, [])  # prefetches for it are let go of
        assert self.source.wrong == [], self.source.wrong
        assert len(self.slots.out) == self.buffer.num_resident
        assert self.slots.num_made == (self.slots.capacity or self.buffer.num_resident)
        if self.slots.capacity is not None:
            assert self.slots.num_free + self.buffer.num_resident == self.slots.capacity
            assert self.slots.most_out <= self.slots.capacity
        num_fit = self.buffer.max_resident or len(ALL)
        self.stepped.pace_s = 0.0
        self.buffer.warm(ALL)
        assert self.buffer.num_resident == num_fit  # no room was lost either
        assert self.totals.hits + self.totals.misses == self.totals.requests == self.num_requests
        for expert_id in self.residents():
            visit = self.begin(expert_id[0], [expert_id[1]])
            self.check(visit, self.buffer.landed(visit))
            self.buffer.finish(visit)
