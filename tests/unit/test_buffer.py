"""The expert buffer, one situation at a time: what is handed out when, loaded by whom, and displaced by what."""

import itertools

import pytest

from collegium.buffering.policies import POLICIES, ExpertId
from collegium.model.architectures import CheckpointError
from expert_svc.buffer import Visit
from tests.buffer_rig import ALL, NUM_EXPERTS, NUM_LAYERS, Rig


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_a_visit_that_needs_more_than_fits_streams_the_rest(capacity: int) -> None:
    rig = Rig(capacity)
    for _ in range(2):
        rig.serve(0, range(NUM_EXPERTS))
    kept = rig.buffer.max_resident
    assert kept == rig.buffer.num_resident == len(rig.residents()) < NUM_EXPERTS
    assert rig.totals.streamed == 2 * (NUM_EXPERTS - kept)
    assert (rig.totals.hits, rig.totals.evictions) == (kept, 0)
    rig.check_end()


def test_a_stream_begins_as_soon_as_another_has_been_computed() -> None:
    rig = Rig(2)  # one resident, and one to stream with
    visit = rig.begin(0, range(3), decode=())
    rig.step_all()
    assert rig.buffer.landed(visit) == [0, 1]
    rig.buffer.release(visit, [0])
    assert rig.buffer.landed(visit) == []
    assert rig.stepped.num_waiting == 0
    rig.buffer.release(visit, [1])
    assert rig.buffer.landed(visit) == []
    assert rig.stepped.num_waiting == 1
    rig.step_all()
    assert rig.buffer.landed(visit) == [2]
    rig.check(visit, [0, 2])
    rig.buffer.finish(visit)
    rig.check_end()


def test_what_is_resident_is_handed_out_before_anything_is_loaded() -> None:
    rig = Rig(8)
    rig.serve(0, [1, 4])
    visit = rig.begin(0, [0, 1, 2, 4])
    assert rig.buffer.landed(visit) == [1, 3]
    assert (visit.missed, rig.stepped.num_waiting, visit.is_over) == ([0, 2], 2, False)
    rig.step_all()
    assert rig.buffer.landed(visit) == [0, 2]
    assert visit.is_over
    rig.buffer.finish(visit)
    rig.check_end()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_displaces_nothing_and_what_it_streams_is_gone(policy: str) -> None:
    rig = Rig(20, policy)
    rig.buffer.warm(ALL)
    before = rig.residents()
    assert len(before) == rig.buffer.max_resident
    for layer in range(NUM_LAYERS):
        visit = rig.serve(layer, range(NUM_EXPERTS), decode=())
        assert {(layer, expert) for expert in visit.missed} == set(ALL[layer * NUM_EXPERTS :][:NUM_EXPERTS]) - before
    assert rig.residents() == before
    assert (rig.totals.evictions, rig.totals.streamed) == (0, len(ALL) - len(before))
    rig.serve(0, [0, 9, 10, 11], decode=(11,))  # one that decodes may, and takes no more than it needs
    assert rig.residents() - before == {(0, 11)}
    assert rig.totals.evictions == 1
    rig.check_end()


def test_a_prefetch_that_came_in_time_is_a_hit_and_stays() -> None:
    rig = Rig(40)
    assert rig.hint(1, 3) == 1
    rig.step_all()
    visit = rig.serve(1, [3, 4])
    assert visit.missed == [4]
    assert rig.residents() == {(1, 3), (1, 4)}
    totals = rig.totals
    assert (totals.prefetched, totals.prefetch_useful, totals.prefetch_late, totals.prefetch_wasted) == (1, 1, 0, 0)
    assert rig.source.fills == [(1, 3), (1, 4)]
    rig.check_end()


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_late_prefetch_is_waited_for_and_counted_and_not_loaded_again(has_begun: bool) -> None:
    rig = Rig(40)
    rig.hint(1, 3)
    if has_begun:
        rig.stepped.begin_next()
    visit = rig.begin(1, [3])
    assert rig.buffer.landed(visit) == []
    rig.step_all()
    assert rig.buffer.landed(visit) == [0]
    rig.check(visit, [0])
    rig.buffer.finish(visit)
    assert (visit.missed, rig.source.fills) == ([3], [(1, 3)])
    totals = rig.totals
    assert (totals.prefetched, totals.prefetch_useful, totals.prefetch_late, totals.prefetch_wasted) == (1, 1, 1, 0)
    assert rig.residents() == {(1, 3)}
    rig.check_end()


@pytest.mark.parametrize("state", ["waiting", "landed", "loading"])
def test_rows_that_wait_take_the_slot_of_a_prefetch(state: str) -> None:
    rig = Rig(20)
    rig.buffer.warm(ALL)
    assert rig.hint(3, 11) == 1
    if state != "waiting":
        rig.stepped.begin_next()
    if state == "landed":
        rig.stepped.land()
    num_fills, num_missing = len(rig.source.fills), rig.slots.num_free + 1
    visit = rig.begin(0, range(NUM_EXPERTS)[-num_missing:], decode=())
    if state == "loading":  # a load that has begun is not torn off: its slot is taken when it has landed
        assert rig.stepped.num_waiting == num_missing - 1
        rig.stepped.land()
        assert rig.buffer.landed(visit) == []
    assert rig.stepped.num_waiting == num_missing
    rig.step_all()
    assert sorted(rig.buffer.landed(visit)) == list(range(num_missing))
    rig.check(visit, range(num_missing))
    rig.buffer.finish(visit)
    assert len(rig.source.fills) - num_fills == num_missing + (state == "loading")
    assert rig.totals.prefetch_wasted == (state != "waiting")
    assert rig.totals.prefetch_useful == 0
    rig.check_end()


def test_a_prefetch_that_nobody_asked_for_is_dropped_when_its_layer_has_come() -> None:
    rig = Rig(40)
    rig.hint(1, 5)
    rig.step_all()
    rig.hint(2, 5)
    rig.serve(1, [0])
    assert rig.totals.prefetch_wasted == 1
    rig.serve(2, [0])  # this one had not begun: nothing is wasted
    assert rig.totals.prefetch_wasted == 1
    assert rig.source.fills == [(1, 5), (1, 0), (2, 0)]
    rig.check_end()


def test_a_hint_begins_with_the_likeliest_and_leaves_a_slot_to_rows_that_wait() -> None:
    rig = Rig(16)
    rig.buffer.warm(ALL[:14])
    assert rig.slots.num_free == 2
    begun = rig.buffer.hint(3, range(NUM_EXPERTS), range(1, NUM_EXPERTS + 1))
    assert 1 < begun < NUM_EXPERTS
    assert [rig.stepped.begin_next().expert_id[1] for _ in range(begun)] == list(range(NUM_EXPERTS))[::-1][:begun]
    assert rig.slots.num_free == 1
    rig.buffer.is_prefetching = False
    assert rig.hint(2, 3) == 0
    rig.check_end()


@pytest.mark.parametrize("pace_s", [0.0, 1.0])
def test_a_hint_displaces_nothing_that_is_being_computed_from(pace_s: float) -> None:
    rig = Rig(8)
    num_fit = rig.buffer.max_resident
    assert num_fit is not None
    rig.buffer.warm((0, expert) for expert in range(num_fit))
    visit = rig.begin(0, range(num_fit))
    rig.stepped.pace_s = pace_s
    rig.hint(1, 5)
    assert rig.totals.evictions == 0
    rig.check(visit, rig.buffer.landed(visit))
    rig.buffer.finish(visit)
    rig.hint(1, 5)
    assert rig.totals.evictions > 0
    rig.check_end()


def test_rows_wait_for_prefetches_that_hold_every_slot_and_no_room_is_lost() -> None:
    rig = Rig(16)
    num_begun = rig.hint(1, *range(NUM_EXPERTS))
    for _ in range(num_begun):
        rig.stepped.begin_next()
    rig.buffer.warm((0, expert) for expert in range(NUM_EXPERTS - 2))
    num_free = rig.slots.num_free
    visit = rig.begin(2, range(num_free + 1))
    assert list(visit.todo) == [num_free]
    while not visit.is_over:
        groups = rig.buffer.landed(visit)
        rig.check(visit, groups)
        rig.buffer.release(visit, groups)
        if not groups:
            rig.stepped.land()
            rig.buffer.help()
    rig.buffer.finish(visit)
    assert rig.residents() >= {(2, expert) for expert in range(num_free + 1)}
    rig.check_end()


def test_a_hint_displaces_what_is_colder_and_nothing_that_is_used_as_much() -> None:
    rig = Rig(16, "ewma")
    num_fit = rig.buffer.max_resident
    assert num_fit is not None
    rig.buffer.warm(ALL)
    for _ in range(30):
        for layer in (0, 1):
            rig.serve(layer, rig.buffer.residency()[layer])
    hot = {(layer, expert) for layer, expert in rig.residents() if layer < 2}
    for _ in range(30):
        rig.hint(0, *range(NUM_EXPERTS))
        rig.step_all()
        rig.settle()
        assert hot <= rig.residents()
    assert rig.totals.evictions > 0  # of those that nobody has asked for
    assert len(rig.residents()) + rig.totals.evictions == num_fit
    rig.check_end()


def test_where_loads_are_slow_slots_are_kept_free_for_prefetches_and_only_there() -> None:
    rig = Rig(24)
    rig.buffer.warm(ALL)
    rig.stepped.pace_s = 1.0
    rig.hint(0, 11)
    num_slow = rig.buffer.num_resident
    assert num_slow < 24 - 2
    for layer in range(NUM_LAYERS):
        rig.serve(layer, [11, 10])
    assert rig.buffer.num_resident <= num_slow
    rig.stepped.pace_s = 0.0
    rig.hint(0, 9)
    for layer in range(NUM_LAYERS):
        rig.serve(layer, range(NUM_EXPERTS))
    assert rig.buffer.num_resident == rig.buffer.max_resident > num_slow
    rig.check_end()


@pytest.mark.parametrize("error", [None, OSError("the disk is gone"), AssertionError("no reason")])
def test_a_failed_load_is_told_once_by_name_and_the_next_visit_reads_again(error: Exception | None) -> None:
    rig = Rig(6, num_threads=1)
    rig.source.error = error
    rig.source.failing = {(0, 2)}
    with pytest.raises(CheckpointError, match="expert 2 of MoE layer 0") as raised:
        rig.serve(0, [1, 2, 3])
    assert error is None or str(error) in str(raised.value)
    rig.serve(0, [1, 2, 3])
    assert rig.source.fills.count((0, 2)) == 2
    assert rig.residents() == {(0, 1), (0, 2), (0, 3)}
    rig.check_end()
    rig.buffer.close()


def test_a_failure_that_a_hint_uncovers_is_still_told() -> None:
    rig = Rig(40)
    rig.source.failing = {(0, 1)}
    visit = rig.begin(0, [1])
    rig.step_all()
    rig.hint(1, 2)
    assert not visit.is_over
    with pytest.raises(CheckpointError, match="expert 1 of MoE layer 0"):
        rig.buffer.landed(visit)
    rig.buffer.finish(visit)
    rig.check_end()


def test_loads_that_turn_out_slow_are_left_to_the_threads() -> None:
    rig = Rig(None, num_threads=1)

    def be_slow(expert_id: ExpertId) -> None:
        rig.loads.mean_s = 1.0

    rig.source.during = be_slow  # while a load seems quick, the thread that waits is to do it and nobody is woken
    rig.serve(0, [0, 1, 2, 3])
    assert not rig.loads.can_help
    rig.serve(0, [4, 5])
    rig.buffer.close()


def test_a_visit_and_warming_load_an_expert_once_whoever_comes_first() -> None:
    rig = Rig(40)
    opened: list[Visit] = []

    def visit_meanwhile(expert_id: ExpertId) -> None:
        rig.source.during = lambda _: None
        opened.append(rig.begin(0, [3]))

    rig.source.during = visit_meanwhile
    assert rig.buffer.warm([(0, 3)]) == 1
    (visit,) = opened
    assert (visit.missed, rig.buffer.landed(visit)) == ([3], [0])
    rig.check(visit, [0])
    rig.buffer.finish(visit)
    visit = rig.begin(0, [4])
    rig.buffer.warm([(0, 4)])
    rig.step_all()
    assert rig.buffer.landed(visit) == [0]
    rig.buffer.finish(visit)
    rig.hint(0, 5)
    rig.stepped.begin_next()
    rig.buffer.warm([(0, 5)])
    assert rig.source.fills == [(0, 3), (0, 4)]
    rig.step_all()
    rig.buffer.warm([(0, 5)])  # the prefetch has landed: it stays
    assert rig.source.fills == [(0, 3), (0, 4), (0, 5)]
    assert rig.residents() == {(0, 3), (0, 4), (0, 5)}
    rig.check_end()


def test_what_a_visit_waits_for_is_leased_by_it_whoever_loads_it() -> None:
    rig = Rig(2)  # one resident
    opened: list[Visit] = []

    def visit_meanwhile(expert_id: ExpertId) -> None:
        rig.source.during = lambda _: None
        opened.append(rig.begin(0, [3, 4, 5]))

    rig.source.during = visit_meanwhile
    rig.buffer.warm([(0, 3)])
    (visit,) = opened
    assert rig.buffer.landed(visit) == [0]
    rig.check(visit, [0])
    rig.buffer.finish(visit)
    rig.check_end()


def test_warming_does_not_load_what_a_visit_has_yet_to_find_a_slot_for() -> None:
    rig = Rig(2)
    rig.serve(1, [0])
    visit = rig.begin(0, [0, 1, 2], decode=())
    assert list(visit.todo) == [1, 2]
    rig.buffer.warm([(0, 2)])
    while not visit.is_over:
        rig.step_all()
        groups = rig.buffer.landed(visit)
        rig.check(visit, groups)
        rig.buffer.release(visit, groups)
    rig.buffer.finish(visit)
    assert sorted(rig.source.fills) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    rig.check_end()


def test_warming_displaces_strangers_only_and_nothing_that_is_leased() -> None:
    rig = Rig(6)
    num_fit = rig.buffer.max_resident
    assert num_fit is not None
    homes = {(0, expert) for expert in range(num_fit - 1)}
    rig.buffer.set_homes(homes)
    rig.serve(1, range(num_fit))
    visit = rig.begin(1, [2])
    rig.buffer.warm(homes)
    assert rig.residents() == homes | {(1, 2)}
    rig.buffer.warm([(2, 4)])  # a stranger displaces neither homes nor what is leased
    assert rig.residents() == homes | {(1, 2)}
    rig.check(visit, rig.buffer.landed(visit))
    rig.buffer.finish(visit)
    assert rig.totals.adopted == num_fit
    rig.buffer.warm([(2, 4)])
    assert rig.residents() == homes | {(2, 4)}
    rig.check_end()


def test_warming_takes_layers_in_turn_as_far_as_slots_go() -> None:
    rig = Rig(9)
    num_fit = rig.buffer.max_resident
    assert num_fit is not None
    seen: list[tuple[int, int]] = []
    assert rig.buffer.warm(ALL, lambda done, total: seen.append((done, total))) == num_fit
    assert rig.residents() == set(sorted(ALL, key=lambda expert_id: expert_id[::-1])[:num_fit])
    assert seen == [(at, num_fit) for at in range(1, num_fit + 1)]
    rig.check_end()


def test_without_a_budget_everything_stays_until_it_is_let_go_of() -> None:
    rig = Rig(None)
    for layer in range(NUM_LAYERS):
        rig.serve(layer, range(NUM_EXPERTS))
    assert rig.residents() == set(ALL)
    visit = rig.begin(0, [4])
    assert rig.buffer.release_others([(0, 1), (2, 5)]) == len(ALL) - 2
    rig.check(visit, rig.buffer.landed(visit))  # its memory lives as long as somebody computes from it
    rig.buffer.finish(visit)
    assert rig.buffer.residency() == {0: [1], 2: [5]}
    assert (rig.slots.num_made, rig.totals.evictions, rig.buffer.budget_bytes) == (2, 0, 0)
    assert rig.hint(0, 3) == 0
    rig.check_end()


def test_with_a_budget_release_others_leaves_residency_to_the_policy() -> None:
    rig = Rig(6)
    rig.serve(0, [1, 2])
    assert rig.buffer.release_others([]) == 0
    assert rig.residents() == {(0, 1), (0, 2)}


def test_a_buffer_that_holds_everything_misses_each_expert_once() -> None:
    rig = Rig(len(ALL))
    for _, layer in itertools.product(range(3), range(NUM_LAYERS)):
        rig.serve(layer, range(NUM_EXPERTS))
    assert (rig.totals.misses, rig.totals.evictions, rig.totals.streamed) == (len(ALL), 0, 0)
    assert rig.totals.hits == 2 * len(ALL)
    rig.check_end()
