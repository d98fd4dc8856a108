"""The balancer at work: RPCs change the roster, one loop turns changes into epochs, watchers hear of them.

Owns roster, planner and the writing of the memory, all on one event loop. A memory that is away delays nothing: what it
missed is written when it is back.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from grpc import aio

from balancer_svc.messages import from_shape, to_view
from balancer_svc.planner import Planner, Wish
from balancer_svc.roster import Member, Roster
from balancer_svc.store import Store, StoreError
from collegium.fabric import logs
from collegium.fabric.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

_TICK_S = 0.1
_COUNTERS_EVERY_S = 1.0
_STORE_RETRY_S = 1.0
_ROLES = {pb.ROLE_GATEWAY: "gateway", pb.ROLE_ROUTER: "router", pb.ROLE_WORKER: "worker"}
Context = aio.ServicerContext[Any, Any]

_log = logs.get("balancer")


class Balancer(balancer_pb2_grpc.BalancerServicer):
    """Leases, placement and the view; call load() once and then run() for as long as it serves."""

    def __init__(
        self, roster: Roster, planner: Planner, store: Store, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._roster = roster
        self._planner = planner
        self._store = store
        self._clock = clock
        self._is_loaded = False
        self._is_store_lost = False
        self._store_retry_s = 0.0
        self._unsaved: set[str] = set()  # ids to write or to forget
        self._unpublished = False
        self._view = to_view(roster, planner)
        self._view_changed = asyncio.Event()
        self._counters_s = clock()
        self._kick = asyncio.Event()
        self._is_over = False
        self._num_expiries = 0
        self._num_plans = 0
        self._num_store_failures = 0

    def counters(self) -> Mapping[str, float]:
        """Count members, plans, expiries and failures of the memory, by series."""
        counts = {
            f'collegium_members{{role="{name}"}}': float(len(self._roster.members(role)))
            for role, name in _ROLES.items()
        }
        return counts | {
            "collegium_placement_epoch": float(self._planner.in_force.epoch),
            "collegium_lease_expiries_total": float(self._num_expiries),
            "collegium_plans_total": float(self._num_plans),
            "collegium_store_failures_total": float(self._num_store_failures),
        }

    async def load(self) -> None:
        """Take up what is remembered; StoreError where the memory cannot be reached."""
        memory = await self._store.load()
        self._planner.restore(memory.model, memory.placement)
        self._planner.see_epoch(memory.newest_epoch)
        self._roster.restore(memory.members, self._clock())
        self._is_loaded = True
        self._show()
        _log.info("remembered", members=len(memory.members), epoch=memory.placement.epoch)

    async def run(self) -> None:
        """Expire leases, plan, publish and write, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._kick.wait()
            except TimeoutError:
                pass
            self._kick.clear()
            await self.tick()

    def end(self) -> None:
        """End all watches."""
        self._is_over = True
        self._view_changed.set()

    async def tick(self) -> None:
        """Do once what is due now."""
        now_s = self._clock()
        for member in self._roster.expire(now_s):
            self._num_expiries += 1
            _log.warning("lease lapsed", member_id=member.member_id, address=member.address)
            self._note(member.member_id)
        workers = self._roster.members(pb.ROLE_WORKER)
        wish = self._planner.wish(workers, now_s)
        if wish is Wish.PLAN:
            await self._plan()
        elif wish is Wish.PUBLISH:
            placement = self._planner.publish()
            self._unpublished = True
            _log.info("placement in force", epoch=placement.epoch, workers=len(placement.worker_ids))
            await self._remember()
            self._show()
        if now_s - self._counters_s >= _COUNTERS_EVERY_S:
            self._counters_s = now_s
            self._show()
        await self._remember()

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Grant a lease."""
        self._require_memory()
        if request.role not in _ROLES:
            raise InvalidArgument("not a role", reason="UNKNOWN_ROLE", field="role", remedy="say what the process is")
        if not request.address:
            raise InvalidArgument("is empty", reason="NO_ADDRESS", field="address", remedy="give HOST:PORT")
        now_s = self._clock()
        if request.role == pb.ROLE_WORKER:
            self._take_model(request)
        member = Member(
            member_id=f"{_ROLES[request.role]}-{secrets.token_hex(5)}",
            role=request.role,
            address=request.address,
            metrics_url=request.metrics_url,
            num_threads=request.num_threads,
            capacity_bytes=request.capacity_bytes,
        )
        self._planner.see_epoch(request.seen_epoch)
        twin = self._roster.join(member, now_s)
        if twin is not None:
            self._note(twin.member_id)
        if request.role == pb.ROLE_WORKER:
            self._planner.worker_joined(now_s, (twin.member_id, member.member_id) if twin else None)
        _log.info("joined", member_id=member.member_id, address=member.address)
        self._note(member.member_id)
        return pb.JoinResponse(member_id=member.member_id, ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Extend a lease."""
        self._require_memory()
        member = self._roster.renew(request.member_id, self._clock())
        if member is None:
            raise NotFound(
                f"no lease {request.member_id!r}: it has lapsed, or never was",
                reason="LEASE_LAPSED",
                field="member_id",
                remedy="join again",
            )
        self._planner.see_epoch(max(request.seen_epoch, request.ready_plan))
        member.counters = dict(request.counters)
        if (request.state, request.ready_plan) != (member.state, member.ready_plan):
            member.state, member.ready_plan = request.state, request.ready_plan
            self._note(member.member_id)
        self._unsaved.add(member.member_id)
        return pb.RenewResponse(ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """End a lease."""
        self._require_memory()
        if self._roster.leave(request.member_id) is not None:
            _log.info("left", member_id=request.member_id)
            self._note(request.member_id)
        return pb.LeaveResponse()

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: Context) -> pb.GetPlacementResponse:
        """Answer the view, with the newest counters."""
        self._require_memory()
        return pb.GetPlacementResponse(view=to_view(self._roster, self._planner))

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Context
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        """Stream the view; a watch that breaks casts doubt on its member."""
        self._require_memory()
        last = None
        try:
            while not self._is_over:
                changed, view = self._view_changed, self._view
                if view is not last:
                    last = view
                    yield view
                else:
                    await changed.wait()
        finally:
            if not self._is_over:
                self._roster.doubt(request.member_id, self._clock())

    def _take_model(self, request: pb.JoinRequest) -> None:
        if not request.HasField("model") or not request.model.layers:
            raise InvalidArgument("is missing", reason="NO_MODEL", field="model", remedy="a worker says what it serves")
        model = from_shape(request.model)
        known = self._planner.model
        others = [worker for worker in self._roster.members(pb.ROLE_WORKER) if worker.address != request.address]
        if known is not None and known.digest != model.digest and others:
            raise FailedPrecondition(
                f"this worker serves the model {model.digest[:12]}, the cluster {known.digest[:12]}",
                reason="OTHER_MODEL",
                field="model.digest",
                remedy="give every worker the manifest and dtype of the same checkpoint",
            )
        self._planner.adopt_model(model)

    async def _plan(self) -> None:
        floor = self._planner.newest_epoch
        epoch = floor + 1
        if not self._is_store_lost:
            try:
                epoch = await self._store.next_epoch(floor)
            except StoreError as error:
                self._store_lost(error)
        # The roster may have changed while the memory answered; then the next tick looks again.
        epoch = max(epoch, self._planner.newest_epoch + 1)
        workers = self._roster.members(pb.ROLE_WORKER)
        if self._planner.wish(workers, self._clock()) is Wish.PLAN:
            plan = self._planner.plan(workers, epoch)
            self._num_plans += 1
            _log.info("planned", epoch=plan.epoch, homes=plan.num_homes())
            self._show()

    async def _remember(self) -> None:
        # Write what the memory has not got yet; while it is away, try once a second.
        if not (self._unsaved or self._unpublished) or self._clock() < self._store_retry_s:
            return
        ids, self._unsaved = self._unsaved, set()
        members = [member for member in map(self._roster.get, ids) if member is not None]
        gone = ids.difference(member.member_id for member in members)
        try:
            await self._store.save_members(members, gone)
            if self._is_store_lost:
                self._store_returned()
            if self._unpublished and self._planner.model is not None:
                self._planner.see_epoch(await self._store.publish(self._planner.in_force, self._planner.model))
                self._unpublished = False
        except StoreError as error:
            self._unsaved |= ids
            self._store_lost(error)

    def _store_lost(self, error: StoreError) -> None:
        if not self._is_store_lost:
            _log.warning("Redis is away; going on from memory", why=str(error))
        self._is_store_lost = True
        self._num_store_failures += 1
        self._store_retry_s = self._clock() + _STORE_RETRY_S

    def _store_returned(self) -> None:
        # It may have come back empty: write everything again.
        _log.info("Redis is back")
        self._is_store_lost = False
        self._unsaved.update(member.member_id for member in self._roster.members())
        self._unpublished = self._planner.in_force.epoch > 0

    def _require_memory(self) -> None:
        if not self._is_loaded:
            raise Unavailable("the balancer has not reached its memory yet", reason="NO_MEMORY", retry_after_s=0.5)

    def _note(self, member_id: str) -> None:
        # A member changed: write it, tell the watchers, and let the loop look at it now.
        self._unsaved.add(member_id)
        self._show()
        self._kick.set()

    def _show(self) -> None:
        self._view = to_view(self._roster, self._planner)
        self._view_changed.set()
        self._view_changed = asyncio.Event()
