"""A balancer in the test's own loop, over real gRPC on port 0, with any store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from balancer_svc.planner import Planner
from balancer_svc.rebalancing import Rules
from balancer_svc.roster import Roster
from balancer_svc.service import Balancer
from balancer_svc.store import Store
from collegium.fabric import rpc
from collegium.fabric.leases import Membership
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

SHAPE = pb.ModelShape(digest="m1", layers=[pb.LayerShape(num_experts=4, expert_bytes=100)] * 2)


@dataclass(kw_only=True)
class RunningBalancer:
    """A balancer that answers at an address."""

    address: str
    balancer: Balancer
    roster: Roster
    planner: Planner


@asynccontextmanager
async def running_balancer(
    store: Store,
    *,
    bind: str = "127.0.0.1:0",
    ttl_s: float = 30.0,
    expected_workers: int = 1,
    window_s: float = 0.1,
    rebalance_s: float = 0.0,
    lead_ttl_s: float = 0.5,
    rules: Rules | None = None,
    num_faults: int = 0,
) -> AsyncIterator[RunningBalancer]:
    """Run a balancer; its leases are long unless the test wants them to lapse, and no tick of it fails."""
    roster = Roster(ttl_s)
    planner = Planner(expected_workers=expected_workers, settle_s=0.0, patience_s=60.0, rules=rules)
    balancer = Balancer(roster, planner, store, window_s=window_s, rebalance_s=rebalance_s, lead_ttl_s=lead_ttl_s)
    server = rpc.Server("balancer", services=("collegium.v1.Balancer",))
    balancer_pb2_grpc.add_BalancerServicer_to_server(balancer.rpcs, server.grpc)
    address = await server.start(bind)
    await balancer.load()
    loop = asyncio.create_task(balancer.run())
    server.set_serving(True)
    try:
        yield RunningBalancer(address=address, balancer=balancer, roster=roster, planner=planner)
    finally:
        balancer.end()
        await asyncio.wait([loop], timeout=10)
        await balancer.resign()
        await server.stop(2.0)
        loop.result()
        assert balancer.num_faults == num_faults


async def first_view(
    membership: Membership, wanted: Callable[[pb.WatchPlacementResponse], bool]
) -> pb.WatchPlacementResponse:
    """Give the first view that has what is wanted."""
    async for view in membership.views():
        if wanted(view):
            return view
    raise AssertionError("views never end")


async def stay_ready(membership: Membership) -> None:
    """Play a worker: report every plan as resident as soon as it is seen."""
    membership.set_state(pb.MEMBER_STATE_SERVING)
    async for view in membership.views():
        if membership.member_id in view.planned.worker_ids:
            membership.set_ready_plan(view.planned.epoch)
