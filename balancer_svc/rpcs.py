"""The balancer's RPCs: checks what members say, and notes it.

Owns no state but the count of what was refused. What follows from a change is the loop's; nothing here waits for Redis.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from grpc import aio

from balancer_svc import validation
from balancer_svc.leadership import Leadership
from balancer_svc.memory import Memory
from balancer_svc.messages import from_shape
from balancer_svc.news import News
from balancer_svc.roster import Member
from balancer_svc.state import ClusterState
from collegium.fabric import logs
from collegium.fabric.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable, shown
from collegium.fabric.model_shape import tell_other_model
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

ROLES = {pb.ROLE_GATEWAY: "gateway", pb.ROLE_ROUTER: "router", pb.ROLE_WORKER: "worker"}
Context = aio.ServicerContext[Any, Any]

_log = logs.get("balancer")


class BalancerRpcs(balancer_pb2_grpc.BalancerServicer):
    """Leases, load, placement and the view, for members and for whoever looks on."""

    def __init__(
        self,
        state: ClusterState,
        leadership: Leadership,
        memory: Memory,
        news: News,
        *,
        max_workers: int,
        max_members: int,
    ) -> None:
        """max_workers: the most that Scale may ask for. max_members: the most leases at once."""
        self._state, self._leadership, self._memory, self._news = state, leadership, memory, news
        self._roster, self._planner = state.roster, state.planner
        self._max_workers, self._max_members = max_workers, max_members
        self._num_scalings_refused = self._num_joins_refused = 0

    def counters(self) -> Mapping[str, float]:
        """Count what was refused, by series."""
        return {
            "collegium_scalings_refused_total": float(self._num_scalings_refused),
            "collegium_joins_refused_total": float(self._num_joins_refused),
        }

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Grant a lease."""
        self._require_memory()
        validation.check_join(request, self._planner.newest_epoch)
        if len(self._roster) >= self._max_members:
            self._num_joins_refused += 1
            raise ResourceExhausted(
                f"there are {len(self._roster)} members; the maximum is {self._max_members}",
                reason="TOO_MANY_MEMBERS",
                remedy="end some of them, or raise the balancer's --max-members",
                retry_after_s=self._roster.ttl_s,
            )
        now_s = self._state.clock()
        if request.role == pb.ROLE_WORKER or (request.role == pb.ROLE_ROUTER and request.HasField("model")):
            self._take_model(request)
        member = Member(
            member_id=f"{ROLES[request.role]}-{secrets.token_hex(5)}",
            role=request.role,
            address=request.address,
            metrics_url=request.metrics_url,
            num_threads=request.num_threads,
            capacity_bytes=request.capacity_bytes,
            failure_domain=request.failure_domain,
            seen_epoch=request.seen_epoch,
            joined_unix_ms=time.time_ns() // 10**6,
        )
        self._state.hear_epoch(request.seen_epoch)
        twin = self._roster.join(member, now_s)
        if twin is not None:
            self._state.forget(twin)
            self._news.note(twin.member_id)
        if request.role == pb.ROLE_WORKER:
            self._planner.worker_joined(now_s, (twin.member_id, member.member_id) if twin else None)
        elif request.role == pb.ROLE_ROUTER and not request.seen_epoch:
            self._state.windows.expect(member.member_id)
        _log.info("joined", member_id=member.member_id, address=member.address)
        self._news.note(member.member_id)
        return pb.JoinResponse(member_id=member.member_id, ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Extend a lease."""
        self._require_memory()
        validation.check_renew(request, self._planner.newest_epoch)
        known = self._roster.get(request.member_id)
        if known is not None and known.role == pb.ROLE_WORKER and self._planner.model is None:
            raise _lapsed(request.member_id)  # the memory lost the model, and workers tell it when they join
        member = self._roster.renew(request.member_id, self._state.clock())
        if member is None:
            raise _lapsed(request.member_id)
        self._state.hear_epoch(max(request.seen_epoch, request.ready_plan))
        member.counters, member.counted_unix_ms = dict(request.counters), time.time_ns() // 10**6
        state = request.state
        if member.state == pb.MEMBER_STATE_RETIRING and state != pb.MEMBER_STATE_DRAINING:
            state = pb.MEMBER_STATE_RETIRING  # not for the worker to say
        is_news = (state, request.ready_plan) != (member.state, member.ready_plan)
        # Workers wait for routers to have seen an epoch before they let go of old copies.
        is_news |= member.role == pb.ROLE_ROUTER and request.seen_epoch > member.seen_epoch
        member.state, member.ready_plan, member.seen_epoch = state, request.ready_plan, request.seen_epoch
        if is_news:
            self._news.note(member.member_id)
        self._memory.backlog.members.add(member.member_id)
        return pb.RenewResponse(ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """End a lease."""
        self._require_memory()
        validation.check(request)
        member = self._roster.leave(request.member_id)
        if member is not None:
            _log.info("left", member_id=request.member_id)
            self._state.forget(member)
            self._news.note(request.member_id)
        return pb.LeaveResponse()

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:
        """Take what a router's gates have chosen."""
        self._require_memory()
        validation.check(request)
        if self._roster.get(request.member_id) is None:
            raise _lapsed(request.member_id)
        counts = validation.read_report(request, self._planner.model)
        if self._leadership.is_leader:
            self._state.windows.report(request.member_id, counts, self._state.clock())
        else:
            self._memory.backlog.reports[request.member_id] = counts
        return pb.ReportLoadResponse()

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        """Note how many workers there should be."""
        self._require_memory()
        self._num_scalings_refused += request.num_workers > self._max_workers
        validation.check_scale(request, self._max_workers)
        if self._planner.model is None:
            raise Unavailable("no worker has joined yet", reason="NO_MODEL", retry_after_s=1.0)
        self._planner.wanted_workers = request.num_workers
        self._memory.backlog.wanted = True
        _log.info("scale", wanted=request.num_workers)
        workers = self._state.workers()
        for worker in self._state.keep_wanted():
            self._news.note(worker.member_id)
        retiring = [w for w in workers if w.state == pb.MEMBER_STATE_RETIRING] + self._planner.to_retire(workers)
        self._news.show()
        self._news.kick.set()
        return pb.ScaleResponse(num_workers=len(workers), retiring=[worker.member_id for worker in retiring])

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: Context) -> pb.GetPlacementResponse:
        """Answer the view, with the newest counters."""
        self._require_memory()
        return pb.GetPlacementResponse(view=self._news.to_view())

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Context
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        """Stream the view; a watch that breaks casts doubt on its member."""
        self._require_memory()
        validation.check(request)
        try:
            async with aclosing(self._news.views()) as views:
                async for view in views:
                    yield view
        finally:
            if not self._news.is_over:
                self._roster.doubt(request.member_id, self._state.clock())

    def _take_model(self, request: pb.JoinRequest) -> None:
        model = from_shape(request.model)
        known = self._planner.model
        others = [worker for worker in self._state.workers() if worker.address != request.address]
        if known is not None and others:
            told = tell_other_model(model.digest, model.parts, known.digest, known.parts)
            if told:
                raise FailedPrecondition(
                    f"this {ROLES[request.role]} serves another model than the cluster's workers: {told}",
                    reason="OTHER_MODEL",
                    field="model.digest",
                    remedy="give every worker and router the same checkpoint, manifest and dtype",
                )
        if request.role != pb.ROLE_WORKER:  # the workers' model is the cluster's
            return
        if known is not None:
            is_in_use = bool(others) or self._planner.in_force.has_shape(known.layers)
            validation.check_same_shape(known, model, is_in_use=is_in_use)
        self._memory.adopt_model(model)
        self._memory.backlog.model = True

    def _require_memory(self) -> None:
        if not self._memory.is_loaded:
            raise Unavailable("the balancer has not reached its memory yet", reason="NO_MEMORY", retry_after_s=0.5)


def _lapsed(member_id: str) -> NotFound:
    return NotFound(
        f"no lease {shown(member_id)}: it has lapsed, or never was",
        reason="LEASE_LAPSED",
        field="member_id",
        remedy="join again",
    )
