"""What the balancer makes of reports: windows, costs, proposals, and who is started and ended for them."""

from __future__ import annotations

import numpy as np
import pytest

from balancer_svc.costs import CostModel, Costs
from balancer_svc.load_windows import LoadWindows, Window, from_message, read_layers, to_message
from balancer_svc.model import Model
from balancer_svc.planner import Load, Planner, Wish
from balancer_svc.rebalancing import Candidate, Rules, lacking, propose, slots_of, to_experts, to_homes, work_of
from balancer_svc.roster import Member, Roster
from collegium.balancing.fleet import Fleet
from collegium.balancing.policies import POLICIES
from collegium.cli.scaling import ScalePlan, plan_scale
from collegium.fabric.metrics import series
from collegium.model.placement import NO_PLACEMENT, LayerSize, Placement, Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb

LAYERS = (LayerSize(num_experts=8, expert_bytes=100),) * 2
SKEWED = [400, 300, 200, 100, 1, 1, 1, 1]


def counts(*decode: int) -> np.ndarray:
    """Counts since the start [3, L, E]: the same in both layers, prompts none, active once a token."""
    row = np.array(decode, np.int64)
    return np.stack([np.stack([row] * 2), np.zeros((2, len(row)), np.int64), np.stack([row] * 2)])


def window(*decode: int) -> Window:
    one, two, three = counts(*decode)
    return Window(unix_ms=1, length_s=1.0, decode=one, prefill=two, activations=three)


def candidates(*names: str, capacity_bytes: int = 0) -> list[Candidate]:
    return [Candidate(worker=Worker(worker_id=name, capacity_bytes=capacity_bytes)) for name in names]


def in_force(*names: str) -> Placement:
    return plan_homes(LAYERS, [Worker(worker_id=name) for name in names], epoch=3)


def test_a_window_holds_what_came_since_the_last_report_and_the_first_of_a_known_router_is_where_it_stands() -> None:
    windows = LoadWindows(window_s=5.0, num_kept=2)
    windows.expect("new")
    windows.report("new", counts(5, 0), 0.0)
    windows.report("old", counts(100, 100), 0.0)  # it was there before this balancer
    windows.report("new", counts(7, 1), 1.0)
    windows.report("old", counts(101, 100), 2.0)
    assert windows.roll(4.9, 1) is None
    closed = windows.roll(5.0, 1)
    assert closed is not None and closed.decode.tolist() == [[8, 1]] * 2
    assert closed.length_s == 5.0
    assert windows.roll(10.0, 1) is None  # nothing was chosen: it says nothing
    windows.report("new", counts(1, 1), 11.0)  # it started again
    assert windows.roll(16.0, 1) is not None
    assert [one.decode[0].tolist() for one in windows.windows] == [[8, 1], [1, 1]]


def test_only_so_many_windows_are_kept_and_another_model_begins_anew() -> None:
    windows = LoadWindows(window_s=1.0, num_kept=2)
    windows.expect("a")
    for second in range(1, 5):
        windows.report("a", counts(second, 0), second - 1.0)
        windows.roll(float(second), second)
    assert [one.unix_ms for one in windows.windows] == [3, 4]
    windows.clear()
    assert not windows.windows


def test_windows_of_another_model_are_not_taken_up() -> None:
    windows = LoadWindows(window_s=1.0, num_kept=12)
    windows.restore([window(1, 2, 3), window(*SKEWED)], (2, 8))
    assert [one.decode.shape for one in windows.windows] == [(2, 8)]


def test_a_window_survives_its_message() -> None:
    before = window(*SKEWED)
    after = from_message(pb.LoadWindow.FromString(to_message(before).SerializeToString()))
    assert np.array_equal(after.decode, before.decode) and np.array_equal(after.activations, before.activations)
    assert (after.unix_ms, after.length_s) == (1, 1.0)


@pytest.mark.parametrize(
    "layers", [[], [pb.LayerLoad(decode_tokens=[1], prefill_tokens=[1, 2], activations=[1])]], ids=["none", "ragged"]
)
def test_counts_without_a_shape_are_refused(layers: list[pb.LayerLoad]) -> None:
    with pytest.raises(ValueError):
        read_layers(layers)


def worker_counts(rows: float, calls: float, busy: float, load_s: float = 0.0, loaded: float = 0.0) -> dict[str, float]:
    return {
        series("collegium_worker_rows_total"): rows,
        series("collegium_expert_calls_total"): calls,
        series("collegium_busy_seconds_total"): busy,
        series("collegium_expert_load_seconds_total"): load_s,
        series("collegium_expert_load_bytes_total", tier="disk"): loaded,
    }


def test_costs_of_rows_and_of_reading_experts_are_told_apart() -> None:
    model, rng = CostModel(), np.random.default_rng(0)
    for worker in ("a", "b"):
        rows = calls = busy = 0.0
        model.note(worker, worker_counts(0, 0, 0))
        for _ in range(12):
            r, c = float(rng.integers(1000, 50_000)), float(rng.integers(500, 2000))
            rows, calls, busy = rows + r, calls + c, busy + 2e-6 * r + 300e-6 * c
            model.note(worker, worker_counts(rows, calls, busy, load_s=rows * 1e-6, loaded=rows * 1e3))
    costs = model.fit()
    assert costs.row_s == pytest.approx(2e-6, rel=0.01)
    assert costs.activation_s == pytest.approx(300e-6, rel=0.01)
    assert costs.byte_s == pytest.approx(1e-9)
    assert model.speed_of("a", costs) == 1.0


def test_a_worker_that_takes_twice_as_long_has_half_the_speed_and_small_differences_do_not_count() -> None:
    model = CostModel()
    for worker, factor in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0), ("slow", 2.0), ("near", 1.1)):
        for at in range(1, 6):
            model.note(worker, worker_counts(1000 * at, 100 * at, 0.1 * factor * at))
    costs = model.fit()
    assert costs.is_measured
    assert model.speed_of("slow", costs) in (0.5, 0.75)
    assert model.speed_of("near", costs) == model.speed_of("a", costs) == 1.0
    assert model.speed_of("unknown", costs) == 1.0


def test_slots_follow_capacities_and_leave_replicas_what_is_over() -> None:
    free = [Worker(worker_id=name) for name in "abc"]
    slots = slots_of(LAYERS, free, 0.25)
    assert slots.sum(1).tolist() == [10, 10]  # 8 experts and a quarter more
    assert slots.max() - slots.min() <= 1
    total = 2 * 8 * 100
    tight = [Worker(worker_id="a", capacity_bytes=total // 4), Worker(worker_id="b", capacity_bytes=total)]
    assert slots_of(LAYERS, tight, 0.25).sum(1).tolist() == [10, 10]
    assert slots_of(LAYERS, tight, 0.25)[:, 0].max() <= 2
    short = [Worker(worker_id="a", capacity_bytes=300), Worker(worker_id="b", capacity_bytes=300)]
    assert slots_of(LAYERS, short, 0.25).sum(1).tolist() == [8, 8]  # every expert has a home, slots or not
    assert slots_of(LAYERS, [Worker(worker_id="a")], 0.5).tolist() == [[8], [8]]  # none twice on a worker


def test_a_placement_is_laid_out_and_read_back() -> None:
    placement = in_force("a", "b", "c")
    experts = to_experts(placement, placement.worker_ids, LAYERS)
    assert to_homes(experts, 8) == placement.homes
    without = to_experts(placement, ("a", "c"), LAYERS)
    assert {e for row in without[0].tolist() for e in row if e >= 0} == {
        e for e, homes in enumerate(placement.homes[0]) if homes != (1,)
    }
    assert (to_experts(NO_PLACEMENT, ("a",), LAYERS) < 0).all()


def test_a_skewed_load_is_evened_out_and_the_decision_says_by_what() -> None:
    base = in_force("a", "b")
    proposal = propose(
        LAYERS, candidates("a", "b"), base, [window(*SKEWED)], Costs(), Rules(target=1.05, horizon_s=1e6), epoch=4
    )
    assert proposal.placement is not None and proposal.placement.epoch == 4
    assert proposal.num_bytes == 100 * proposal.num_moves > 0
    assert "moves" in proposal.decision and "of the mean" in proposal.decision


def test_an_even_load_or_too_little_of_it_moves_nothing_and_says_why() -> None:
    base = in_force("a", "b")
    even = propose(LAYERS, candidates("a", "b"), base, [window(*[100] * 8)], Costs(), Rules(), epoch=4)
    assert even.placement is None and "nothing to move" in even.decision
    assert lacking([], LAYERS) == "no load has been seen yet"
    assert "choices a layer have been seen" in lacking([window(1, *[0] * 7)], LAYERS)
    assert "of another model" in lacking([window(1, 2)], LAYERS)
    ragged = (*LAYERS[:1], LayerSize(num_experts=4, expert_bytes=1))
    assert "differ" in lacking([window(*SKEWED)], ragged)
    assert lacking([window(*SKEWED)], LAYERS) == ""


def test_what_chance_alone_could_have_made_is_not_acted_on() -> None:
    base = in_force("a", "b")
    load = [13 if homes == (0,) else 10 for homes in base.homes[0]]  # 52 against 40 of 92 choices: within chance
    few = propose(LAYERS, candidates("a", "b"), base, [window(*load)], Costs(), Rules(horizon_s=1e6), epoch=4)
    many = propose(
        LAYERS, candidates("a", "b"), base, [window(*[n * 1000 for n in load])], Costs(), Rules(horizon_s=1e6), epoch=4
    )
    assert few.placement is None and many.placement is not None


def test_a_plan_for_those_who_are_left_keeps_what_they_have() -> None:
    base = in_force("a", "b", "c")
    proposal = propose(LAYERS, candidates("a", "c"), base, [window(*[100] * 8)], Costs(), Rules(byte_budget=1), epoch=4)
    placement = proposal.placement
    assert placement is not None and placement.worker_ids == ("a", "c")
    for layer, row in enumerate(base.homes):
        for expert, (w,) in enumerate(row):
            if base.worker_ids[w] != "b":
                assert base.worker_ids[w] in placement.workers_of(layer, expert)


def test_where_no_worker_is_left_the_plan_from_nothing_is_the_one_that_is_measured() -> None:
    hot = [window(*SKEWED)]
    proposal = propose(LAYERS, candidates("c", "d"), in_force("a", "b"), hot, Costs(), Rules(byte_budget=1), epoch=4)
    assert proposal.placement is not None and proposal.placement.worker_ids == ("c", "d")
    workers = [one.worker for one in candidates("c", "d")]
    fleet = Fleet(
        num_slots=slots_of(LAYERS, workers, Rules().spare_share), speeds=np.ones(2), domains=np.zeros(2, np.int64)
    )
    history = work_of(hot, Costs())
    measured = to_homes(POLICIES["replicated"](history, fleet), LAYERS[0].num_experts)
    assert proposal.placement.homes == measured
    assert proposal.num_bytes == 100 * proposal.num_moves and proposal.num_moves >= 8 * len(LAYERS)
    assert "from nothing" in proposal.decision


def test_a_load_that_is_remembered_shapes_the_first_plan_even_without_a_placement() -> None:
    plan = Planner(expected_workers=0, settle_s=0.0, patience_s=1.0)
    plan.restore(Model(digest="d", layers=LAYERS), NO_PLACEMENT)
    workers = [member("a"), member("b")]
    load = Load(windows=(window(*[n * 100 for n in SKEWED]),))
    first, counted = plan.plan(workers, 1, load), plan_homes(LAYERS, [Worker(worker_id=name) for name in "ab"])
    assert first.has_shape(LAYERS) and first.homes != counted.homes


def member(name: str, state: pb.MemberState = pb.MEMBER_STATE_SERVING) -> Member:
    return Member(member_id=name, role=pb.ROLE_WORKER, address=f"{name}:1", state=state)


def planner(*workers: Member) -> Planner:
    made = Planner(expected_workers=0, settle_s=0.0, patience_s=1.0, ready_limit_s=10.0)
    made.adopt_model(Model(digest="m", layers=LAYERS))
    made.plan(workers, 1)
    made.publish()
    return made


def test_load_moves_a_placement_of_live_workers_and_nothing_else_meanwhile() -> None:
    workers = [member("a"), member("b")]
    plan = planner(*workers)
    load = Load(windows=(window(*[n * 100 for n in SKEWED]),), costs=Costs(byte_s=0.0))
    assert plan.can_move(workers) and not plan.can_move(workers[:1])
    assert plan.propose(plan.candidates(workers, Load()), Load()).decision == "no load has been seen yet"
    proposal = plan.propose(plan.candidates(workers, load), load)
    assert proposal.placement is not None
    plan.adopt(Placement(epoch=2, worker_ids=proposal.placement.worker_ids, homes=proposal.placement.homes), 100.0)
    assert not plan.can_move(workers)
    assert plan.wish(workers, 101.0) is Wish.NOTHING
    assert plan.wish(workers, 111.0) is Wish.GIVE_UP  # what is in force does well without it
    for worker in workers:
        worker.ready_plan = 2
    assert plan.wish(workers, 111.0) is Wish.PUBLISH


def test_a_plan_that_is_being_worked_out_does_not_mind_workers_that_begin_to_leave() -> None:
    workers = [member("a"), member("b")]
    plan = planner(*workers)
    candidates = plan.candidates(workers[:1], Load())
    for worker in workers:
        worker.state = pb.MEMBER_STATE_DRAINING
    assert plan.draft(candidates, 2).worker_ids == ("a",)
    assert plan.candidates(workers, Load()) == []


def test_a_joiner_that_cannot_load_is_left_out_until_it_says_something_new() -> None:
    workers = [member("a"), member("b")]
    plan = planner(*workers)
    workers.append(member("broken"))
    assert plan.wish(workers, 0.0) is Wish.PLAN
    plan.plan(workers, 2, now_s=0.0)
    workers[0].ready_plan = workers[1].ready_plan = 2
    assert plan.wish(workers, 11.0) is Wish.GIVE_UP
    assert plan.give_up(workers) == ["broken"]
    assert plan.wish(workers, 11.0) is Wish.NOTHING and plan.can_move(workers)
    workers.pop(1)  # and when another one dies, its experts get homes
    assert plan.wish(workers, 12.0) is Wish.PLAN
    assert plan.plan(workers, 3).worker_ids == ("a",)
    workers[1].ready_plan = 2  # it has loaded after all
    assert [worker.member_id for worker in plan.live(workers)] == ["a", "broken"]


def test_of_those_that_retire_the_oldest_are_kept_when_more_are_wanted_again() -> None:
    workers = [member(name) for name in "abcd"]
    for at, worker in enumerate(workers):
        worker.joined_unix_ms = at
    plan = planner(*workers)
    plan.wanted_workers = 2
    for worker in plan.to_retire(workers[::-1]):
        worker.state = pb.MEMBER_STATE_RETIRING
    assert [worker.member_id for worker in workers if worker.is_leaving] == ["c", "d"]
    assert plan.to_keep(workers) == []
    plan.wanted_workers = 3
    assert [worker.member_id for worker in plan.to_keep(workers)] == ["c"]
    plan.wanted_workers = 0
    assert [worker.member_id for worker in plan.to_keep(workers)] == ["c", "d"]


def test_the_newest_workers_retire_first_and_get_no_homes() -> None:
    workers = [member("a"), member("b"), member("c")]
    plan = planner(*workers)
    assert plan.to_retire(workers) == []
    plan.wanted_workers = 2
    assert [worker.member_id for worker in plan.to_retire(workers)] == ["c"]
    workers[2].state = pb.MEMBER_STATE_RETIRING
    assert plan.to_retire(workers) == []
    assert plan.wish(workers, 0.0) is Wish.PLAN
    assert plan.plan(workers, 2).worker_ids == ("a", "b")


def test_a_balancer_that_follows_takes_what_was_published_and_planned() -> None:
    workers = [member("a"), member("b")]
    plan = planner(*workers)
    newer = Placement(epoch=5, worker_ids=("a",), homes=plan.in_force.homes)
    assert plan.follow(newer, None, 0.0)
    assert not plan.follow(newer, None, 0.0)
    assert plan.follow(newer, Placement(epoch=6, worker_ids=("b",), homes=newer.homes), 0.0)
    assert plan.planned is not None and plan.newest_epoch == 6
    older = Placement(epoch=4, worker_ids=("b",), homes=newer.homes)
    plan.follow(older, None, 0.0)
    assert plan.in_force is newer and plan.planned is None


def test_news_of_members_at_another_balancer_is_merged_and_our_own_stay() -> None:
    roster = Roster(ttl_s=5)
    roster.join(member("mine"), 0)
    record = member("theirs")
    record.num_renewals = 3
    assert roster.merge([record], 1.0)
    assert [one.member_id for one in roster.members()] == ["mine", "theirs"]
    newer = member("theirs", pb.MEMBER_STATE_DRAINING)
    newer.num_renewals = 4
    assert roster.merge([newer], 5.5)
    assert roster.get("theirs").state == pb.MEMBER_STATE_DRAINING  # type: ignore[union-attr]
    assert not roster.merge([newer], 5.6)  # no news, no longer lease
    assert [lost.member_id for lost in roster.expire(10.4)] == ["mine"]
    roster.excuse_remote(10.4)  # the memory is away: nothing can be known
    assert roster.expire(15.0) == []
    assert roster.merge([], 15.0)
    assert roster.members() == []


def test_whom_we_hear_no_more_the_memory_judges() -> None:
    roster = Roster(ttl_s=5)
    roster.join(member("moved"), 0)
    roster.join(member("here"), 0)
    roster.renew("here", 4)
    roster.hand_over(6.0)
    record = member("moved")
    record.num_renewals = 9
    assert roster.merge([record], 6.0) is False
    assert roster.merge([], 7.0)
    assert [one.member_id for one in roster.members()] == ["here"]


def view(wanted: int, *members: tuple[str, pb.MemberState], named: tuple[str, ...] = ()) -> pb.WatchPlacementResponse:
    return pb.WatchPlacementResponse(
        wanted_workers=wanted,
        members=[
            pb.Member(member_id=f"id-{address}", role=pb.ROLE_WORKER, address=address, state=state)
            for address, state in members
        ],
        placement=pb.Placement(epoch=1, worker_ids=[f"id-{address}" for address in named]),
    )


def test_workers_are_started_and_ended_until_there_are_as_many_as_wanted() -> None:
    serving, retiring = pb.MEMBER_STATE_SERVING, pb.MEMBER_STATE_RETIRING
    running = {"worker-0": "a:1", "worker-1": "b:1"}
    both = (("a:1", serving), ("b:1", serving))
    assert plan_scale(view(0, *both), running) == ScalePlan()
    assert plan_scale(view(2, *both), running) == ScalePlan()
    assert plan_scale(view(4, *both), running).num_to_start == 2
    assert plan_scale(view(4, *both, ("x:1", serving)), running).num_to_start == 1  # somebody else runs one
    assert plan_scale(view(5000, *both), running).num_to_start == 4
    assert plan_scale(view(5000, *both), {**running, "worker-2": "c:1"}).num_to_start == 3  # one has not joined yet
    assert plan_scale(view(3, *both), {**running, "worker-2": "c:1"}) == ScalePlan()  # it has not joined yet
    one = (("a:1", serving), ("b:1", retiring))
    assert plan_scale(view(1, *one, named=("a:1", "b:1")), running) == ScalePlan()  # it still has homes
    assert plan_scale(view(1, *one, named=("a:1",)), running) == ScalePlan(to_end=("worker-1",))
    assert plan_scale(view(2, *one, named=("a:1",)), running).num_to_start == 1
