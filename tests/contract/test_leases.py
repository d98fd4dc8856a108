"""Membership against a balancer that the test scripts: joining, renewing, losing, and views that never go back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from collegium.fabric import rpc
from collegium.fabric.errors import FailedPrecondition, NotFound, Unavailable
from collegium.fabric.leases import Membership
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc


class Scripted(balancer_pb2_grpc.BalancerServicer):
    """Grants numbered leases, notes what it hears, streams what the test puts in."""

    def __init__(self) -> None:
        self.joins: list[pb.JoinRequest] = []
        self.renewals: asyncio.Queue[pb.RenewRequest] = asyncio.Queue()
        self.left: list[str] = []
        self.views: asyncio.Queue[pb.WatchPlacementResponse] = asyncio.Queue()
        self.lapsed: set[str] = set()
        self.ttl_ms = 60_000
        self.refusal: Exception | None = None

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        if self.refusal is not None:
            raise self.refusal
        self.joins.append(request)
        return pb.JoinResponse(member_id=f"m{len(self.joins)}", ttl_ms=self.ttl_ms)

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        if request.member_id in self.lapsed:
            raise NotFound("lapsed")
        self.renewals.put_nowait(request)
        return pb.RenewResponse(ttl_ms=self.ttl_ms)

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self.left.append(request.member_id)
        return pb.LeaveResponse()

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Any
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        while True:
            yield await self.views.get()


@asynccontextmanager
async def scripted(bind: str = "127.0.0.1:0") -> AsyncIterator[tuple[Scripted, str]]:
    balancer, server = Scripted(), rpc.Server("balancer", services=("collegium.v1.Balancer",))
    server.add(balancer_pb2_grpc.add_BalancerServicer_to_server, balancer)
    address = await server.start(bind)
    try:
        yield balancer, address
    finally:
        await server.stop(0)


def view(epoch: int, *members: str) -> pb.WatchPlacementResponse:
    return pb.WatchPlacementResponse(
        placement=pb.Placement(epoch=epoch), members=[pb.Member(member_id=member) for member in members]
    )


async def renewal_with(balancer: Scripted, **wanted: object) -> pb.RenewRequest:
    while True:
        request = await balancer.renewals.get()
        if all(getattr(request, name) == value for name, value in wanted.items()):
            return request


async def test_a_member_joins_reports_and_leaves() -> None:
    async with scripted() as (balancer, address):
        async with Membership(
            address, pb.ROLE_ROUTER, "h:1", "http://m", 3, counters=lambda: {"steps": 4.0}
        ) as membership:
            assert membership.member_id == "m1"
            membership.set_state(pb.MEMBER_STATE_SERVING)
            renewal = await renewal_with(balancer, state=pb.MEMBER_STATE_SERVING)
            assert renewal.counters["steps"] == 4.0
        (join,) = balancer.joins
        assert (join.role, join.address, join.metrics_url, join.num_threads) == (pb.ROLE_ROUTER, "h:1", "http://m", 3)
        assert balancer.left == ["m1"]


async def test_leases_are_renewed_before_they_lapse() -> None:
    async with scripted() as (balancer, address):
        balancer.ttl_ms = 30
        async with Membership(address, pb.ROLE_ROUTER, "h:1"):
            for _ in range(5):
                await balancer.renewals.get()


async def test_a_lapsed_lease_is_replaced_and_everything_reported_again() -> None:
    async with scripted() as (balancer, address), Membership(address, pb.ROLE_WORKER, "h:1") as membership:
        balancer.views.put_nowait(view(3))
        await anext(membership.views())
        balancer.lapsed.add("m1")
        membership.set_ready_plan(7)
        renewal = await renewal_with(balancer, member_id="m2", ready_plan=7)
        assert renewal.seen_epoch == 3
        assert membership.member_id == "m2"
        assert balancer.joins[1].seen_epoch == 3


async def test_views_from_the_past_are_never_shown() -> None:
    async with scripted() as (balancer, address), Membership(address, pb.ROLE_ROUTER, "h:1") as membership:
        views = membership.views()
        epochs = []
        for epoch in (4, 2, 0, 4, 5):
            balancer.views.put_nowait(view(epoch, f"at {epoch}"))
        while not epochs or epochs[-1] < 5:
            epochs.append((await anext(views)).placement.epoch)
        assert epochs == sorted(epochs)
        assert set(epochs) <= {4, 5}


async def test_a_slow_reader_gets_the_newest_view() -> None:
    async with scripted() as (balancer, address), Membership(address, pb.ROLE_ROUTER, "h:1") as membership:
        quick = membership.views()
        for epoch in range(1, 6):
            balancer.views.put_nowait(view(epoch))
        while (await anext(quick)).placement.epoch < 5:
            pass
        assert (await anext(membership.views())).placement.epoch == 5


async def test_a_balancer_that_goes_and_comes_back_is_found_again() -> None:
    async with scripted() as (balancer, address):
        membership = Membership(address, pb.ROLE_ROUTER, "h:1")
        await membership.__aenter__()
        balancer.views.put_nowait(view(1))
        await anext(membership.views())
    assert membership.view is not None and membership.view.placement.epoch == 1
    async with scripted(address) as (again, _):
        again.views.put_nowait(view(2))
        membership.set_state(pb.MEMBER_STATE_SERVING)
        async for seen in membership.views():
            if seen.placement.epoch == 2:
                break
        await renewal_with(again, member_id="m1", seen_epoch=2)
        await membership.__aexit__(None, None, None)


async def test_no_balancer_ends_the_wait_with_the_settings_name() -> None:
    async with scripted() as (_, address):
        pass
    with pytest.raises(Unavailable, match="did not answer within") as caught:
        async with Membership(address, pb.ROLE_ROUTER, "h:1", join_limit_s=0.3):
            pass
    assert caught.value.field == "--balancer"


async def test_a_refusal_is_told_at_once() -> None:
    async with scripted() as (balancer, address):
        balancer.refusal = FailedPrecondition("another model", reason="OTHER_MODEL")
        with pytest.raises(FailedPrecondition, match="another model"):
            async with Membership(address, pb.ROLE_WORKER, "h:1"):
                pass
