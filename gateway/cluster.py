"""What GetCluster and ScaleWorkers answer: the balancer's word, or without a balancer what this gateway sees itself.

Owns the translation from membership to status. Asks the balancer for fresh counters; where it is away, tells the newest
view that was watched, and how old that is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from grpc import aio

from collegium.fabric.errors import FailedPrecondition, InvalidArgument, from_rpc_error
from collegium.fabric.leases import Membership
from collegium.fabric.views import check_view
from collegium.v1 import balancer_pb2, balancer_pb2_grpc
from collegium.v1 import inference_pb2 as pb
from gateway.pool import RouterPool

_ASK_S = 1.0
_SCALE_S = 5.0
_ROLES = {
    balancer_pb2.ROLE_GATEWAY: "gateway",
    balancer_pb2.ROLE_ROUTER: "router",
    balancer_pb2.ROLE_WORKER: "worker",
}
_STATES = {
    balancer_pb2.MEMBER_STATE_JOINING: "JOINING",
    balancer_pb2.MEMBER_STATE_SERVING: "SERVING",
    balancer_pb2.MEMBER_STATE_DRAINING: "DRAINING",
    balancer_pb2.MEMBER_STATE_RETIRING: "RETIRING",
}


class ClusterView:
    """Describes the cluster. balancer: its address, or empty. membership: this gateway's own, once it has joined."""

    def __init__(
        self,
        pool: RouterPool,
        me: Callable[[], pb.MemberStatus],
        *,
        balancer: str = "",
        channel: aio.Channel | None = None,
        membership: Callable[[], Membership | None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._me = me
        self._balancer = balancer
        self._channel = channel
        self._membership = membership
        self._answered_s = time.monotonic()

    async def describe(self) -> pb.GetClusterResponse:
        """Give members by role and id, the placement epoch, and homes per worker."""
        if self._channel is None:
            return self._without_balancer()
        stub: Any = balancer_pb2_grpc.BalancerStub(self._channel)
        state, stale_ms = "SERVING", 0
        try:
            response: balancer_pb2.GetPlacementResponse = await stub.GetPlacement(
                balancer_pb2.GetPlacementRequest(), timeout=_ASK_S
            )
            check_view(response.view)
            view = response.view
            self._answered_s = time.monotonic()
        except (aio.AioRpcError, ValueError):  # or what it answered cannot be used
            membership = self._membership()
            heard_s = self._answered_s if membership is None else max(self._answered_s, membership.viewed_s)
            state, stale_ms = "LOST", max(1, round((time.monotonic() - heard_s) * 1e3))
            view = (None if membership is None else membership.view) or balancer_pb2.WatchPlacementResponse()
        balancer = pb.MemberStatus(role="balancer", member_id="balancer", address=self._balancer, state=state)
        return from_view(view, balancer, stale_ms)

    async def scale(self, num_workers: int) -> pb.ScaleWorkersResponse:
        """Pass on how many workers there should be."""
        if not num_workers:
            raise InvalidArgument("is 0", reason="NO_WORKER", field="num_workers", remedy="give at least 1")
        if self._channel is None:
            raise FailedPrecondition(
                "this gateway knows routers by name and no balancer",
                reason="NO_BALANCER",
                remedy="start it with --balancer instead of --routers",
            )
        stub: Any = balancer_pb2_grpc.BalancerStub(self._channel)
        try:
            answer: balancer_pb2.ScaleResponse = await stub.Scale(
                balancer_pb2.ScaleRequest(num_workers=num_workers), timeout=_SCALE_S
            )
        except aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return pb.ScaleWorkersResponse(num_workers=answer.num_workers, retiring=answer.retiring)

    def _without_balancer(self) -> pb.GetClusterResponse:
        routers = [
            pb.MemberStatus(
                role="router",
                member_id=attachment.router_id,
                address=attachment.address,
                state="SERVING" if attachment.can_serve else "LOST",
            )
            for attachment in self._pool.attachments
        ]
        return pb.GetClusterResponse(members=_sorted([self._me(), *routers]))


def from_view(
    view: balancer_pb2.WatchPlacementResponse, balancer: pb.MemberStatus, stale_ms: int = 0
) -> pb.GetClusterResponse:
    """Write the balancer's view as a status."""
    members = [
        pb.MemberStatus(
            role=_ROLES.get(member.role, "unknown"),
            member_id=member.member_id,
            address=member.address,
            state=_STATES.get(member.state, "JOINING"),
            num_threads=member.num_threads,
            metrics_url=member.metrics_url,
            counters=member.counters,
            joined_unix_ms=member.joined_unix_ms,
            counted_unix_ms=member.counted_unix_ms,
        )
        for member in view.members
    ]
    return pb.GetClusterResponse(
        members=_sorted([balancer, *members]),
        placement_epoch=view.placement.epoch,
        experts_per_worker=_homes(view.placement),
        balance=view.balance,
        wanted_workers=view.wanted_workers,
        stale_ms=stale_ms,
    )


def _homes(placement: balancer_pb2.Placement) -> Mapping[str, int]:
    counts = Counter(index for layer in placement.layers for index in layer.worker_idx)
    return {worker_id: counts[index] for index, worker_id in enumerate(placement.worker_ids)}


def _sorted(members: list[pb.MemberStatus]) -> list[pb.MemberStatus]:
    return sorted(members, key=lambda member: (member.role, member.member_id))
