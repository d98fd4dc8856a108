"""What peers tell the balancer: each field has a bound; what is beyond it is refused by name and not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer_svc import validation
from balancer_svc.costs import Costs
from balancer_svc.load_windows import MAX_IN_WINDOW, LoadWindows
from balancer_svc.planner import Planner
from balancer_svc.rebalancing import Candidate, Rules, lacking, propose
from balancer_svc.roster import Member, Roster
from balancer_svc.service import Balancer
from collegium.fabric import bounds, rpc
from collegium.fabric.errors import CollegiumError, FailedPrecondition, InvalidArgument, NotFound
from collegium.model.placement import LayerSize, Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb
from gateway.cluster import ClusterView
from tests.balancers import SHAPE, running_balancer
from tests.memory_store import MemoryStore

MESSAGES: dict[str, Any] = dict(pb.DESCRIPTOR.message_types_by_name)
RPCS = ("Join", "Renew", "Leave", "WatchPlacement", "ReportLoad", "Scale")
BEYOND_INT = [2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def test_every_field_of_every_message_has_a_bound() -> None:
    assert set(bounds.BOUNDS) == set(MESSAGES)
    for name, descriptor in MESSAGES.items():
        assert set(bounds.BOUNDS[name]) == {field.name for field in descriptor.fields}, name


class Rig:
    """A balancer with one worker and one router, called without a wire and ticked by hand."""

    def __init__(self, **bounds: int) -> None:
        self.store = MemoryStore()
        self.roster = Roster(30.0)
        self.planner = Planner(expected_workers=1, settle_s=0.0, patience_s=60.0)
        self.balancer = Balancer(self.roster, self.planner, self.store, **({"max_workers": 8} | bounds))
        self.worker_id = self.router_id = ""

    async def __aenter__(self) -> Rig:
        await self.balancer.load()
        self.worker_id = (await self.call("Join", worker())).member_id
        self.router_id = (await self.call("Join", pb.JoinRequest(role=pb.ROLE_ROUTER, address="r:1"))).member_id
        return self

    async def __aexit__(self, *_: object) -> None:
        self.balancer.end()

    async def call(self, rpc: str, request: Message) -> Any:
        answer = getattr(self.balancer.rpcs, rpc)(request, None)
        return await anext(answer) if rpc == "WatchPlacement" else await answer

    async def refusal(self, rpc: str, request: Message) -> CollegiumError:
        before = self.kept()
        with pytest.raises(CollegiumError) as caught:
            await self.call(rpc, request)
        assert self.kept() == before, "something of a refused request was kept"
        return caught.value

    def kept(self) -> object:
        return (
            [repr(member) for member in self.roster.members() if member.__setattr__("expires_s", 1e9) is None],
            repr(self.planner.model),
            self.planner.newest_epoch,
            self.planner.wanted_workers,
            repr(self.balancer.memory.backlog),
        )

    def valid(self, rpc: str) -> Any:
        layers = [pb.LayerLoad(decode_tokens=[1] * 4, prefill_tokens=[1] * 4, activations=[1] * 4)] * 2
        return {
            "Join": worker("w:2"),
            "Renew": pb.RenewRequest(member_id=self.worker_id, state=2, counters={"a": 1.0}),
            "Leave": pb.LeaveRequest(member_id=self.worker_id),
            "WatchPlacement": pb.WatchPlacementRequest(member_id=self.worker_id),
            "ReportLoad": pb.ReportLoadRequest(member_id=self.router_id, layers=layers),
            "Scale": pb.ScaleRequest(num_workers=2),
        }[rpc]


def worker(address: str = "w:1", **changes: Any) -> pb.JoinRequest:
    return pb.JoinRequest(**({"role": pb.ROLE_WORKER, "address": address, "model": SHAPE} | changes))


def beyond(rule: bounds.Rule) -> list[Callable[[Any, str], None]]:
    """Ways to set a field of a message to something that its rule refuses and the wire carries."""

    def put(value: object) -> Callable[[Any, str], None]:
        return lambda message, name: setattr(message, name, value)

    def extend(values: Iterable[Any]) -> Callable[[Any, str], None]:
        kept = list(values)
        return lambda message, name: getattr(message, name).extend(kept)

    match rule:
        case bounds.Number(least=least, most=most):
            return [put(value) for value in (most + 1, *BEYOND_INT, least - 1) if value > most or value < least]
        case bounds.Real():
            return [put(value) for value in (math.nan, math.inf, -math.inf, 1e300)]
        case bounds.Text(most=most):
            return [put("x" * (most + 1)), put("é" * 100_000), put("a\nb"), put("\0"), put("a\u202eb:1")]
        case bounds.Numbers(most_items=items, most=most):
            return [extend([most + 1]), extend([0] * (items + 1)), extend([2**64 - 1]), extend([2**63])]
        case bounds.Counters():
            bad = ({"a": math.nan}, {"a": math.inf}, {"a": -math.inf}, {"a": 1e300}, {"k" * 300: 1.0}, {"\n": 1.0})
            many = {f"series_{i}": 1.0 for i in range(10_000)}
            long = {f"{i:03}" + "k" * 250: 1.0 for i in range(400)}
            return [lambda message, name, more=more: getattr(message, name).update(more) for more in (*bad, many, long)]
        case _:
            return []


def fields_of(message: Any, prefix: str = "") -> Iterable[tuple[Any, str, str, bounds.Rule]]:
    """Every field of a message and of those within: (its message, its name, its path, its rule)."""
    for name, rule in bounds.BOUNDS[message.DESCRIPTOR.name].items():
        if isinstance(rule, bounds.Nested):
            if message.HasField(name):
                yield from fields_of(getattr(message, name), f"{prefix}{name}.")
        elif isinstance(rule, bounds.Messages):
            for index, inner in enumerate(getattr(message, name)):
                yield from fields_of(inner, f"{prefix}{name}[{index}].")
        else:
            yield message, name, prefix + name, rule


@pytest.mark.parametrize("rpc", RPCS)
async def test_each_field_beyond_its_bound_is_refused_by_name_and_nothing_is_kept(rpc: str) -> None:
    seen = 0
    async with Rig() as rig:
        paths = [path for _, _, path, _ in fields_of(rig.valid(rpc))]
        for at, path in enumerate(paths):
            message, name, _, rule = list(fields_of(rig.valid(rpc)))[at]
            for way in range(len(beyond(rule))):
                request = rig.valid(rpc)
                message, name, _, rule = list(fields_of(request))[at]
                try:
                    beyond(rule)[way](message, name)
                except ValueError:
                    continue  # the wire does not carry it
                error = await rig.refusal(rpc, request)
                assert isinstance(error, InvalidArgument), (path, error)
                assert (error.field or "").startswith(path), (path, error)
                assert "give" in (error.remedy or ""), error
                assert len(error.message) < 700
                seen += 1
    assert seen >= 1


@settings(max_examples=40)
@given(st.data())
async def test_no_request_makes_the_balancer_fail_otherwise_than_by_a_status(data: st.DataObject) -> None:
    numbers = st.sampled_from([0, 1, 3, 4, 5, 4_095, 4_097, 2**31, 2**32 - 1, 2**48, 2**52, 2**53, *BEYOND_INT])
    texts = st.one_of(st.text(max_size=5), st.sampled_from(["w:1", "x" * 129, "y" * 100_000]))
    async with Rig() as rig:
        for _ in range(data.draw(st.integers(1, 6))):
            rpc = data.draw(st.sampled_from(RPCS))
            request = rig.valid(rpc)
            known = list(fields_of(request))
            for _ in range(data.draw(st.integers(1, 2))):
                message, name, _, rule = data.draw(st.sampled_from(known))
                try:
                    match rule:
                        case bounds.Number():
                            setattr(message, name, data.draw(numbers))
                        case bounds.Text():
                            setattr(message, name, data.draw(texts))
                        case bounds.Numbers():
                            del getattr(message, name)[:]
                            getattr(message, name).extend(data.draw(st.lists(numbers, max_size=5)))
                        case bounds.Counters():
                            getattr(message, name)[data.draw(texts)] = data.draw(st.floats())
                        case _:
                            pass
                except ValueError:
                    continue
            try:
                await rig.call(rpc, request)
            except CollegiumError as error:
                assert isinstance(error, InvalidArgument | NotFound | FailedPrecondition), error
            await rig.balancer.tick()
            assert rig.balancer.num_faults == 0
            rig.balancer.rpcs.GetPlacement(pb.GetPlacementRequest(), None).close()  # pyright: ignore


async def test_an_epoch_beyond_what_redis_counts_is_refused_and_the_next_plan_is_made() -> None:
    async with Rig() as rig:
        for epoch in (2**52 + 2**51 + 1, *BEYOND_INT):
            assert (await rig.refusal("Join", worker("w:9", seen_epoch=epoch))).field == "seen_epoch"
            for field in ("seen_epoch", "ready_plan"):
                renewal = pb.RenewRequest(member_id=rig.worker_id, state=2, **{field: epoch})
                assert (await rig.refusal("Renew", renewal)).field == field
        await rig.balancer.tick()
        assert rig.planner.planned is not None and rig.planner.planned.epoch == 1


async def test_the_highest_epoch_that_a_peer_may_tell_leaves_room_to_count_on() -> None:
    async with Rig() as rig:
        await rig.call("Renew", pb.RenewRequest(member_id=rig.worker_id, state=2, seen_epoch=2**52))
        await rig.balancer.tick()
        epoch = 2**52 + 1
        assert rig.planner.planned is not None and rig.planner.planned.epoch == epoch
        await rig.call("Renew", pb.RenewRequest(member_id=rig.worker_id, state=2, ready_plan=epoch))
        await rig.balancer.tick()
        assert rig.planner.in_force.epoch == epoch
        await rig.call("Renew", pb.RenewRequest(member_id=rig.router_id, state=2, seen_epoch=epoch))


async def test_members_that_saw_what_was_counted_beyond_that_join_a_balancer_whose_memory_was_lost() -> None:
    async with Rig() as rig:
        for request in (worker("w:2", seen_epoch=2**52 + 7), worker("w:3", seen_epoch=2**52 + 2**51)):
            assert (await rig.call("Join", request)).member_id
        await rig.call("Renew", pb.RenewRequest(member_id=rig.router_id, state=2, seen_epoch=2**52 + 7))
        assert rig.planner.newest_epoch == 2**52  # and nobody's word raises it further


async def test_a_worker_of_the_clusters_digest_with_other_layers_is_refused() -> None:
    async with Rig() as rig:
        for layers in (
            SHAPE.layers[:1],
            [*SHAPE.layers, SHAPE.layers[0]],
            [pb.LayerShape(num_experts=3, expert_bytes=100)] * 2,
        ):
            error = await rig.refusal("Join", worker("w:9", model=pb.ModelShape(digest=SHAPE.digest, layers=layers)))
            assert isinstance(error, FailedPrecondition)
            assert (error.reason, error.field) == ("OTHER_MODEL", "model.layers")
        # Nor once its worker has gone, as long as a placement of the true shape is in force.
        await rig.balancer.tick()
        await rig.call("Renew", pb.RenewRequest(member_id=rig.worker_id, state=2, ready_plan=1))
        await rig.balancer.tick()
        await rig.call("Leave", pb.LeaveRequest(member_id=rig.worker_id))
        await rig.refusal("Join", worker("w:9", model=pb.ModelShape(digest=SHAPE.digest, layers=SHAPE.layers[:1])))
        await rig.call("Join", worker("w:9"))


@pytest.mark.parametrize("wanted", [9, 2**16, 2**31, 2**32 - 1])
async def test_more_workers_than_can_be_started_are_refused_with_the_bound(wanted: int) -> None:
    async with Rig() as rig:
        error = await rig.refusal("Scale", pb.ScaleRequest(num_workers=wanted))
        assert error.message.startswith(f"num_workers: is {wanted}; the maximum is 8")
        await rig.call("Scale", pb.ScaleRequest(num_workers=8))
        await rig.refusal("Scale", pb.ScaleRequest(num_workers=0))  # is not above the bound
        assert rig.balancer.counters()["collegium_scalings_refused_total"] == 1


async def test_more_members_than_the_bound_are_refused_and_counted_until_one_leaves() -> None:
    async with Rig(max_members=3) as rig:  # it has two
        await rig.call("Join", worker("w:2"))
        for _ in range(2):
            error = await rig.refusal("Join", worker("w:3"))
            assert error.reason == "TOO_MANY_MEMBERS"
            assert error.message.startswith("there are 3 members; the maximum is 3")
            assert "--max-members" in (error.remedy or "")
        await rig.call("Leave", pb.LeaveRequest(member_id=rig.router_id))
        await rig.call("Join", worker("w:3"))
        assert rig.balancer.counters()["collegium_joins_refused_total"] == 2


async def test_a_caller_of_a_gateway_is_told_the_balancers_bound() -> None:
    async with running_balancer(MemoryStore()) as running, rpc.channel(running.address) as channel:
        nothing: Any = None
        cluster = ClusterView(nothing, nothing, balancer=running.address, channel=channel)
        for wanted in (257, 2**31, 2**32 - 1):
            with pytest.raises(InvalidArgument, match=rf"num_workers: is {wanted}; the maximum is 256") as caught:
                await cluster.scale(wanted)
            assert "--max-workers" in (caught.value.remedy or "")


def counts_of(value: int) -> np.ndarray:
    return np.full((3, 2, 4), value, np.int64)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**44, bounds.MAX_CHOICES])), max_size=300))
def test_sums_over_routers_reports_and_windows_never_wrap(reports: list[tuple[int, int]]) -> None:
    windows = LoadWindows(window_s=1.0, num_kept=12)
    for router in range(4):
        windows.expect(f"r{router}")
    for at, (router, value) in enumerate(reports):
        windows.report(f"r{router}", counts_of(value), float(at) / 10)
        windows.roll(float(at) / 10, at)
    for window in windows.windows:
        for counts in (window.decode, window.prefill, window.activations, window.tokens):
            assert counts.min() >= 0 and counts.max() <= 2 * MAX_IN_WINDOW


def test_the_largest_load_that_can_be_kept_is_still_planned_by() -> None:
    layers = [LayerSize(num_experts=bounds.MAX_EXPERTS, expert_bytes=1)]
    windows = LoadWindows(window_s=0.0, num_kept=12)
    windows.expect("r")
    full = np.full((3, 1, bounds.MAX_EXPERTS), bounds.MAX_CHOICES, np.int64)
    for at in range(24):
        windows.report("r", full if at % 2 == 0 else 0 * full, float(at))
        windows.roll(float(at), at)
    kept = windows.windows
    assert sum(window.tokens.sum(1) for window in kept).min() > 0
    assert lacking(kept, layers) == ""
    small = [LayerSize(num_experts=4, expert_bytes=100)]
    few = LoadWindows(window_s=0.0, num_kept=12)
    few.expect("r")
    few.report("r", np.full((3, 1, 4), bounds.MAX_CHOICES, np.int64), 0.0)
    few.roll(1.0, 1)
    workers = [Worker(worker_id=name) for name in ("a", "b")]
    base = plan_homes(small, workers)
    proposal = propose(small, [Candidate(worker=one) for one in workers], base, few.windows, Costs(), Rules(), epoch=2)
    assert proposal.decision


async def test_more_counters_than_a_view_can_carry_cost_the_counters_and_not_the_view() -> None:
    async with Rig() as rig:
        series = {f"{i:04}" + "k" * 90: 1.0 for i in range(300)}
        validation.check(pb.RenewRequest(member_id="m", counters=series))
        for i in range(320):
            rig.roster.join(Member(member_id=f"g{i}", role=pb.ROLE_GATEWAY, address=f"g:{i}", counters=series), 0.0)
        view = (await rig.call("GetPlacement", pb.GetPlacementRequest())).view
        assert len(view.members) == 322
        assert view.ByteSize() < 8 * 2**20


def test_a_member_keeps_its_lease_whatever_its_counters_are() -> None:
    counters = {"nan": math.nan, "inf": math.inf, "huge": 1e300, "k" * 300: 1.0, "\n": 1.0, "good": 2.0}
    usable = bounds.usable_counters(counters | {f"s{i}": 1.0 for i in range(9_999)})
    assert usable["good"] == 2.0
    validation.check(pb.RenewRequest(member_id="m", counters=usable))
    long = bounds.usable_counters({f"{i:03}" + "k" * 250: 1.0 for i in range(400)})
    validation.check(pb.RenewRequest(member_id="m", counters=long))
    assert long
