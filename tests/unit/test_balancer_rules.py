"""Leases and the life of a placement, on a clock that the test holds."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import data, integers

from balancer_svc.model import Model
from balancer_svc.planner import Planner, Wish
from balancer_svc.roster import Member, Roster
from collegium.model.placement import LayerSize
from collegium.v1 import balancer_pb2 as pb

MODEL = Model(digest="m", layers=(LayerSize(num_experts=6, expert_bytes=10),) * 2)


def member(name: str, role: pb.Role = pb.ROLE_WORKER) -> Member:
    return Member(member_id=name, role=role, address=f"{name}:1")


def planner(expected_workers: int = 0, settle_s: float = 0.0) -> Planner:
    made = Planner(expected_workers=expected_workers, settle_s=settle_s, patience_s=20.0)
    made.adopt_model(MODEL)
    return made


def put_in_force(plan: Planner, *workers: Member) -> None:
    plan.plan(workers, plan.newest_epoch + 1)
    plan.publish()


def test_a_lease_lapses_when_its_time_is_over_and_not_before() -> None:
    roster = Roster(ttl_s=5)
    roster.join(member("a"), 0)
    assert roster.renew("a", 4.9) is not None
    assert roster.expire(9.8) == []
    assert [lost.member_id for lost in roster.expire(9.9)] == ["a"]
    assert roster.renew("a", 9.9) is None


def test_a_lease_that_has_lapsed_cannot_be_renewed_even_before_it_is_swept() -> None:
    roster = Roster(ttl_s=5)
    roster.join(member("a"), 0)
    assert roster.renew("a", 5) is None


def test_a_broken_watch_halves_a_lease_and_a_renewal_restores_it() -> None:
    roster = Roster(ttl_s=10)
    roster.join(member("a"), 0)
    roster.join(member("b"), 0)
    roster.doubt("a", 1)
    roster.doubt("b", 1)
    roster.renew("b", 2)
    assert [lost.member_id for lost in roster.expire(6)] == ["a"]
    assert roster.expire(11) == []


def test_a_broken_watch_never_lengthens_a_lease() -> None:
    roster = Roster(ttl_s=10)
    roster.join(member("a"), 0)
    roster.doubt("a", 9)
    assert len(roster.expire(10)) == 1


def test_a_balancer_that_was_stopped_blames_nobody() -> None:
    roster = Roster(ttl_s=5, stall_s=1)
    roster.join(member("a"), 0)
    roster.join(member("b"), 0)
    for tenths in range(21):
        assert roster.expire(tenths / 10) == []
    assert roster.renew("a", 1000) is not None
    assert roster.expire(1000.1) == []
    for tenths in range(2, 50):
        lost = roster.expire(1000 + tenths / 10)
        if lost:
            break
    assert [each.member_id for each in lost] == ["b"]
    assert roster.renew("a", 1003.1) is not None


def test_an_address_has_room_for_one_member_of_a_role() -> None:
    roster = Roster(ttl_s=5)
    roster.join(member("a"), 0)
    again = Member(member_id="a2", role=pb.ROLE_WORKER, address="a:1")
    twin = roster.join(again, 1)
    assert twin is not None and twin.member_id == "a"
    assert [each.member_id for each in roster.members()] == ["a2"]


def test_remembered_members_have_one_lease_to_be_heard_of_and_are_not_planned_with() -> None:
    roster = Roster(ttl_s=5)
    roster.restore([member("a"), member("b")], 100)
    plan = planner()
    put_in_force(plan, member("a"), member("gone"))
    assert plan.wish(roster.members(), 101) is Wish.NOTHING
    roster.renew("a", 104)
    assert plan.wish(roster.members(), 104) is Wish.NOTHING
    assert [lost.member_id for lost in roster.expire(105)] == ["b"]
    assert plan.wish(roster.members(), 105) is Wish.PLAN


def test_the_first_plan_waits_for_quiet() -> None:
    plan, workers = planner(settle_s=0.5), [member("a")]
    plan.worker_joined(10.0)
    assert plan.wish(workers, 10.4) is Wish.NOTHING
    assert plan.wish(workers, 10.5) is Wish.PLAN


def test_the_first_plan_waits_for_the_expected_workers_within_patience() -> None:
    plan, workers = planner(expected_workers=2), [member("a")]
    plan.worker_joined(10.0)
    assert plan.wish(workers, 29.9) is Wish.NOTHING
    assert plan.wish([*workers, member("b")], 11.0) is Wish.PLAN
    assert plan.wish(workers, 30.0) is Wish.PLAN


def test_a_plan_comes_into_force_when_every_worker_that_it_names_is_ready() -> None:
    plan, workers = planner(), [member("a"), member("b")]
    planned = plan.plan(workers, 1)
    workers[0].ready_plan = 1
    assert plan.wish(workers, 0) is Wish.NOTHING
    workers[1].ready_plan = 1
    assert plan.wish(workers, 0) is Wish.PUBLISH
    assert plan.publish() == planned
    assert plan.wish(workers, 0) is Wish.NOTHING


def test_a_worker_that_dies_before_it_is_ready_holds_nothing_up() -> None:
    plan, workers = planner(), [member("a"), member("b")]
    plan.plan(workers, 1)
    workers[0].ready_plan = 1
    assert plan.wish(workers[:1], 0) is Wish.PLAN
    assert plan.plan(workers[:1], 2).worker_ids == ("a",)
    assert plan.wish(workers[:1], 0) is Wish.NOTHING


def test_without_workers_the_placement_stays_as_it_is() -> None:
    plan = planner()
    put_in_force(plan, member("a"))
    assert plan.wish([], 0) is Wish.NOTHING
    assert plan.in_force.worker_ids == ("a",)


def test_a_leaving_worker_gets_no_homes() -> None:
    plan, workers = planner(), [member("a"), member("b")]
    put_in_force(plan, *workers)
    workers[0].state = pb.MEMBER_STATE_DRAINING
    assert plan.wish(workers, 0) is Wish.PLAN
    assert plan.plan(workers, 2).worker_ids == ("b",)


def test_a_worker_under_a_new_lease_keeps_its_homes() -> None:
    plan, workers = planner(), [member("a"), member("b")]
    put_in_force(plan, *workers)
    plan.worker_joined(0, ("a", "a2"))
    after = plan.plan([member("a2"), member("b")], 2)
    assert after.homes == plan.in_force.homes
    assert after.worker_ids == ("a2", "b")


def test_another_model_starts_from_nothing_but_above_the_old_epochs() -> None:
    plan = planner()
    put_in_force(plan, member("a"))
    plan.adopt_model(Model(digest="other", layers=(LayerSize(num_experts=3, expert_bytes=1),)))
    assert plan.wish([member("b")], 1) is Wish.PLAN
    assert [len(layer) for layer in plan.plan([member("b")], plan.newest_epoch + 1).homes] == [3]


class PlacementLife(RuleBasedStateMachine):
    """Whatever workers do, epochs only grow and what is published has every home on a worker that was ready."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = planner()
        self.workers: list[Member] = []
        self.num_joined = 0
        self.epochs = [0]

    def step(self) -> None:
        wish = self.planner.wish(self.workers, 0)
        if wish is Wish.PLAN:
            self.planner.plan(self.workers, self.planner.newest_epoch + 1)
        elif wish is Wish.PUBLISH:
            placement = self.planner.publish()
            ready = {worker.member_id for worker in self.workers if worker.ready_plan >= placement.epoch}
            assert set(placement.worker_ids) <= ready
            self.epochs.append(placement.epoch)

    @rule()
    def join(self) -> None:
        self.num_joined += 1
        self.workers.append(member(f"w{self.num_joined}"))
        self.planner.worker_joined(0)
        self.step()

    @rule(choice=data())
    def die(self, choice: data) -> None:
        if self.workers:
            self.workers.pop(choice.draw(integers(0, len(self.workers) - 1)))
        self.step()

    @rule(choice=data())
    def load(self, choice: data) -> None:
        if self.workers and self.planner.planned is not None:
            worker = self.workers[choice.draw(integers(0, len(self.workers) - 1))]
            worker.ready_plan = self.planner.planned.epoch
        self.step()

    @rule(choice=data())
    def doubt(self, choice: data) -> None:
        if self.workers:
            worker = self.workers[choice.draw(integers(0, len(self.workers) - 1))]
            worker.is_confirmed = not worker.is_confirmed
        self.step()

    @invariant()
    def epochs_only_grow(self) -> None:
        assert self.epochs == sorted(set(self.epochs))

    def teardown(self) -> None:
        """When all are well and ready, everything settles and every live worker is named."""
        for _ in range(3):
            for worker in self.workers:
                worker.is_confirmed = True
                worker.ready_plan = self.planner.newest_epoch
            self.step()
        if self.workers:
            assert set(self.planner.in_force.worker_ids) == {worker.member_id for worker in self.workers}


TestPlacementLife = PlacementLife.TestCase
TestPlacementLife.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
