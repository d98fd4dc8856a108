"""The expert buffer exceeds nothing, loses nothing and mixes nothing up, in whatever order things happen."""

import threading

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from collegium.buffering.policies import POLICIES, ExpertId
from collegium.model.architectures import CheckpointError
from expert_svc.buffer import Visit
from tests.buffer_rig import ALL, NUM_EXPERTS, NUM_LAYERS, Rig

LAYERS = st.integers(0, NUM_LAYERS - 1)
EXPERTS = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True)
SOME = st.sets(st.sampled_from(ALL), max_size=8)
CAPACITIES = st.one_of(st.none(), st.integers(2, 8), st.integers(16, len(ALL)))
CHOICES = st.sets(st.integers(0, NUM_EXPERTS - 1))


class EveryOrder(RuleBasedStateMachine):
    """Visits, hints, warming, failures and landings in every order, one step at a time."""

    @initialize(capacity=CAPACITIES, policy=st.sampled_from(POLICIES), can_prefetch=st.booleans())
    def make(self, capacity: int | None, policy: str, can_prefetch: bool) -> None:
        self.rig = Rig(capacity, policy, can_prefetch=can_prefetch)
        self.buffer, self.source, self.loads = self.rig.buffer, self.rig.source, self.rig.stepped
        self.visit: Visit | None = None
        self.given: list[int] = []
        self.decode: set[int] = set()
        self.held: set[int] = set()  # groups that were handed out and not released
        self.hits: set[ExpertId] = set()
        self.is_prompt = False
        self.failed: set[ExpertId] = set()  # whose loads may have failed
        self.homes: set[ExpertId] = set()

    @precondition(lambda self: self.visit is None)
    @rule(layer=LAYERS, experts=EXPERTS, decode=CHOICES)
    def begin(self, layer: int, experts: list[int], decode: set[int]) -> None:
        evictions = self.rig.totals.evictions
        before = self.rig.residents()
        self.visit = self.rig.begin(layer, experts, decode)
        self.given, self.held, self.decode = [], set(), decode
        self.hits = {(layer, expert) for expert in experts} & before
        self.is_prompt = not decode.intersection(experts)
        assert self.rig.totals.evictions - evictions <= len(decode.intersection(experts))
        assert not self.hits - self.rig.residents()

    @precondition(lambda self: self.visit is not None and not self.visit.is_over)
    @rule()
    def take(self) -> None:
        assert self.visit is not None
        evictions = self.rig.totals.evictions
        try:
            groups = self.buffer.landed(self.visit)
        except CheckpointError as error:
            assert any(f"expert {index} of MoE layer {layer}" in str(error) for layer, index in self.failed)
            self.buffer.finish(self.visit)
            self.visit = None
            return
        assert not set(groups) & set(self.given)
        self.given += groups
        self.held |= set(groups)
        assert not self.is_prompt or self.rig.totals.evictions == evictions

    @precondition(lambda self: self.visit is not None and self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        assert self.visit is not None
        groups = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        self.release_groups(groups)

    def release_groups(self, groups: set[int]) -> None:
        assert self.visit is not None
        self.buffer.release(self.visit, sorted(groups))
        self.held -= groups
        computed = {(self.visit.layer, self.visit.experts[group]) for group in groups}
        self.hits -= {expert_id for expert_id in computed if expert_id[1] not in self.decode}  # leased no longer

    @precondition(lambda self: self.visit is not None and self.visit.is_over)
    @rule()
    def finish(self) -> None:
        assert self.visit is not None
        assert sorted(self.given) == list(range(len(self.visit.experts)))
        self.buffer.finish(self.visit)
        self.visit = None

    @precondition(lambda self: self.visit is not None)
    @rule()
    def abandon(self) -> None:
        assert self.visit is not None
        self.buffer.finish(self.visit)
        self.visit = None

    @precondition(lambda self: self.loads.num_waiting)
    @rule()
    def begin_load(self) -> None:
        self.loads.begin_next()

    @precondition(lambda self: self.loads.begun)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        self.failed |= self.source.failing
        self.loads.land(data.draw(st.integers(0, len(self.loads.begun) - 1)))

    @precondition(lambda self: self.loads.num_urgent)
    @rule()
    def help(self) -> None:
        self.failed |= self.source.failing
        self.buffer.help()

    @precondition(lambda self: self.rig.can_prefetch)
    @rule(layer=LAYERS, experts=EXPERTS)
    def hint(self, layer: int, experts: list[int]) -> None:
        self.rig.settle()
        evictions, before = self.rig.totals.evictions, self.rig.residents()
        self.rig.hint(layer, *experts)
        assert len(before - self.rig.residents()) == self.rig.totals.evictions - evictions

    @rule(pace_s=st.sampled_from([0.0, 1.0]))
    def loads_are_fast_or_slow(self, pace_s: float) -> None:
        self.loads.pace_s = pace_s

    @rule(experts=SOME)
    def warm(self, experts: set[ExpertId]) -> None:
        self.failed |= self.source.failing
        before = self.rig.residents()
        try:
            self.buffer.warm(experts)
        except CheckpointError:
            return
        gone = before - self.rig.residents()
        assert not gone & self.homes

    @rule(experts=SOME)
    def set_homes(self, experts: set[ExpertId]) -> None:
        self.homes = experts
        self.buffer.set_homes(experts)

    @precondition(lambda self: self.rig.slots.capacity is None)
    @rule(kept=SOME)
    def release_others(self, kept: set[ExpertId]) -> None:
        self.buffer.release_others(kept)
        self.hits = set()

    @precondition(lambda self: self.rig.can_prefetch)
    @rule(is_on=st.booleans())
    def switch_prefetching(self, is_on: bool) -> None:
        self.buffer.is_prefetching = is_on

    @precondition(lambda self: self.loads.unfinished)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        self.source.failing.add(data.draw(st.sampled_from([load.expert_id for load in self.loads.unfinished])))

    @invariant()
    def what_was_handed_out_is_there(self) -> None:
        if self.visit is not None:
            self.rig.check(self.visit, sorted(self.held))
            assert not self.hits - self.rig.residents()  # what is leased stays

    @invariant()
    def no_budget_is_exceeded(self) -> None:
        slots = self.rig.slots
        if slots.capacity is not None:
            assert len(slots.out) + slots.num_free == slots.num_made == slots.capacity
        assert self.rig.totals.requests == self.rig.num_requests
        assert self.source.wrong == [], self.source.wrong

    def teardown(self) -> None:
        while self.visit is not None:
            self.loads.on_landed()
            self.release_groups(set(self.held))
            if self.visit.is_over:
                self.finish()
                break
            num_given = len(self.given)
            self.failed |= self.source.failing
            self.take()
            if self.visit is not None and len(self.given) == num_given and not self.buffer.help():
                assert self.loads.num_waiting or self.loads.begun, "the visit waits for nothing"
                self.rig.step_all()
        self.source.failing.clear()
        self.rig.check_end()


EveryOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40, phases=(Phase.generate, Phase.shrink))
TestEveryOrder = EveryOrder.TestCase


@given(
    capacity=CAPACITIES,
    policy=st.sampled_from(POLICIES),
    can_prefetch=st.booleans(),
    visits=st.lists(st.tuples(LAYERS, EXPERTS, CHOICES, st.booleans()), min_size=1, max_size=12),
)
@settings(max_examples=40)
def test_each_miss_copies_once_unless_a_prefetch_has_begun_to(
    capacity: int | None, policy: str, can_prefetch: bool, visits: list[tuple[int, list[int], set[int], bool]]
) -> None:
    rig = Rig(capacity, policy, can_prefetch=can_prefetch)
    expected = 0
    for layer, experts, decode, is_begun in visits:
        rig.hint(layer, *experts)
        if is_begun and rig.stepped.num_waiting:
            rig.stepped.begin_next()
            expected += 1
        begun = {load.expert_id for load in rig.stepped.begun}
        visit = rig.begin(layer, experts, decode)
        expected += sum((layer, expert) not in begun for expert in visit.missed)
        while not visit.is_over:
            if groups := rig.buffer.landed(visit):
                rig.check(visit, groups)
                rig.buffer.release(visit, groups)
            elif not rig.buffer.help():
                rig.stepped.land()
        rig.buffer.finish(visit)
    expected += rig.stepped.num_waiting
    rig.step_all()
    assert len(rig.source.fills) == expected
    rig.check_end()


@pytest.mark.parametrize("num_threads", [0, 1, 2])
@given(
    capacity=CAPACITIES,
    policy=st.sampled_from(POLICIES),
    visits=st.lists(st.tuples(LAYERS, EXPERTS, CHOICES, LAYERS, EXPERTS), min_size=1, max_size=10),
    warmed=SOME,
    failing=st.sets(st.sampled_from(ALL), max_size=4),
)
@settings(max_examples=20)
def test_threads_that_load_and_one_that_warms_lose_nothing(
    num_threads: int,
    capacity: int | None,
    policy: str,
    visits: list[tuple[int, list[int], set[int], int, list[int]]],
    warmed: set[ExpertId],
    failing: set[ExpertId],
) -> None:
    rig = Rig(capacity, policy, num_threads=num_threads)
    rig.source.failing = set(failing)

    def warm() -> None:
        for _ in range(3):
            try:
                rig.buffer.warm(warmed)
            except CheckpointError as error:
                assert "is damaged" in str(error)

    beside = threading.Thread(target=warm)
    beside.start()
    for layer, experts, decode, next_layer, expected in visits:
        try:
            rig.serve(layer, experts, decode)
        except CheckpointError as error:
            assert "is damaged" in str(error)
        rig.hint(next_layer, *expected)
    beside.join()
    rig.source.failing.clear()
    rig.check_end()
    rig.buffer.close()
