"""The balancer at work: RPCs change the roster, one loop turns changes into epochs, watchers hear of them.

Owns roster, planner, load windows and the writing of the memory, all on one event loop; only the arithmetic of a look
at the load runs in a thread. A memory that is away delays nothing: what it missed is written when it is back. Of
several balancers that share a memory one leads: it alone plans and publishes, the others follow what it wrote.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpc import aio

from balancer_svc import validation
from balancer_svc.backlog import NUM_WINDOWS, Backlog
from balancer_svc.balance import Account
from balancer_svc.costs import CostModel
from balancer_svc.load_windows import LoadWindows, Window
from balancer_svc.messages import from_shape, to_view
from balancer_svc.planner import NO_LOAD, Load, Model, Planner, Wish
from balancer_svc.rebalancing import has_even_layers
from balancer_svc.roster import Member, Roster
from balancer_svc.store import NO_TOKEN, FencedError, Store, StoreError
from balancer_svc.worker_totals import WorkerTotals
from collegium.fabric import logs
from collegium.fabric.bounds import MAX_MEMBERS
from collegium.fabric.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable, shown
from collegium.fabric.faults import Faults
from collegium.fabric.model_shape import tell_other_model
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

_TICK_S = 0.1
_COUNTERS_EVERY_S = 1.0
_STORE_RETRY_S = 1.0
_SHARE_EVERY_S = 1.0  # how often balancers look at what the others have written, at least
_LONGEST_PAUSE_S = 2.0  # of a part of the tick that fails
_ROLES = {pb.ROLE_GATEWAY: "gateway", pb.ROLE_ROUTER: "router", pb.ROLE_WORKER: "worker"}
Context = aio.ServicerContext[Any, Any]

_log = logs.get("balancer")


class Balancer(balancer_pb2_grpc.BalancerServicer):
    """Leases, placement and the view; call load() once and then run() for as long as it serves."""

    def __init__(
        self,
        roster: Roster,
        planner: Planner,
        store: Store,
        *,
        window_s: float = 5.0,
        rebalance_s: float = 10.0,
        lead_ttl_s: float = 3.0,
        max_workers: int = 256,
        max_members: int = MAX_MEMBERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rebalance_s: time between looks at the load; 0: homes follow members alone. lead_ttl_s: how long another
        balancer waits for this one to come back before it leads. max_workers: the most that Scale may ask for.
        max_members: the most leases at once.
        """
        self._roster = roster
        self._planner = planner
        self._store = store
        self._clock = clock
        self._rebalance_s, self._lead_ttl_s = rebalance_s, lead_ttl_s
        self._max_workers, self._max_members = max_workers, max_members
        self._share_every_s = min(_SHARE_EVERY_S, lead_ttl_s / 3)
        self._windows = LoadWindows(window_s=window_s, num_kept=NUM_WINDOWS)
        self._costs = CostModel()
        self._account = Account(clock())
        self._worker_totals = WorkerTotals(window_s)
        self._balancer_id = secrets.token_hex(5)
        self._token = NO_TOKEN
        self._is_loaded = False
        self._is_store_lost = False
        self._store_retry_s = 0.0
        self._backlog = Backlog()
        self._leads_from_s = 0.0  # a balancer that takes over first hears of what the one before it has done
        self._leaders_balance: pb.Balance | None = None
        self._view = to_view(roster, planner)
        self._view_changed = asyncio.Event()
        self._counters_s = self._shared_s = self._looked_s = clock()
        self._kick = asyncio.Event()
        self._is_over = False
        self._parts: Sequence[tuple[Callable[[float], Awaitable[None]], Faults]] = [
            (part, Faults(_log, what, longest_pause_s=_LONGEST_PAUSE_S, clock=clock))
            for part, what in (
                (self._share_when_due, "sharing with other balancers"),
                (self._lead_when_due, "leading"),
                (self._count_when_due, "adding up the workers"),
                (self._remember_now, "writing to Redis"),
            )
        ]
        self._num_expiries = 0
        self._num_plans = 0
        self._num_store_failures = 0
        self._num_scalings_refused = self._num_joins_refused = 0

    @property
    def is_leader(self) -> bool:
        """Whether this balancer plans and publishes."""
        return self._token != NO_TOKEN

    def counters(self) -> Mapping[str, float]:
        """Count members, plans, moves, expiries, failures of the memory, and say how even the load is, by series."""
        counts = {
            f'collegium_members{{role="{name}"}}': float(len(self._roster.members(role)))
            for role, name in _ROLES.items()
        }
        return (
            counts
            | {
                "collegium_published_epoch": float(self._planner.in_force.epoch),
                "collegium_lease_expiries_total": float(self._num_expiries),
                "collegium_plans_total": float(self._num_plans),
                "collegium_store_failures_total": float(self._num_store_failures),
                "collegium_scalings_refused_total": float(self._num_scalings_refused),
                "collegium_joins_refused_total": float(self._num_joins_refused),
                "collegium_loop_faults_total": float(self.num_faults),
                "collegium_balancer_is_leader": float(self.is_leader),
                "collegium_balancer_has_memory": float(not self._is_store_lost),
            }
            | self._account.counters(self._clock())
            # Of several balancers one adds workers up: who sums over pages must not count them twice.
            | (self._worker_totals.counters() if self.is_leader else {})
        )

    async def load(self) -> None:
        """Take up what is remembered; StoreError where the memory cannot be reached."""
        memory = await self._store.load()
        model = memory.model
        if model is not None and memory.placement.epoch and not memory.placement.has_shape(model.layers):
            _log.warning("the model in Redis does not fit the placement there and is dropped", key="model")
            model = None
        self._planner.restore(model, memory.placement)
        self._planner.follow(memory.placement, memory.planned, self._clock())
        self._planner.see_epoch(memory.newest_epoch)
        self._take_wanted(memory.wanted_workers)
        self._restore_windows(memory.windows)
        self._roster.restore(memory.members, self._clock())
        self._token = await self._store.lead(self._balancer_id, self._lead_ttl_s)
        self._is_loaded = True
        self._measure()
        self._show()
        _log.info(
            "remembered",
            members=len(memory.members),
            epoch=memory.placement.epoch,
            windows=len(memory.windows),
            leads=self.is_leader,
        )

    async def run(self) -> None:
        """Expire leases, plan, publish and write, until `end`."""
        while not self._is_over:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._kick.wait()
            except TimeoutError:
                pass
            self._kick.clear()
            await self.tick()

    def end(self) -> None:
        """End all watches, and `run` after what it is doing."""
        self._is_over = True
        self._view_changed.set()
        self._kick.set()

    async def resign(self) -> None:
        """Give the lead back, so that another balancer need not wait for it."""
        if self.is_leader and not self._is_store_lost:
            try:
                await self._store.resign(self._balancer_id)
            except StoreError as error:
                _log.debug("the lead could not be given back", why=str(error))

    async def tick(self) -> None:
        """Do once what is due now. What a part raises is logged once per kind, and that part is tried again later."""
        now_s = self._clock()
        for part, faults in self._parts:
            if now_s < faults.again_s:
                continue
            try:
                await part(now_s)
            except Exception as error:
                faults.note(error)
            else:
                faults.clear()

    @property
    def num_faults(self) -> int:
        """How many parts of ticks have failed by a fault of ours."""
        return sum(faults.num_faults for _, faults in self._parts)

    async def _share_when_due(self, now_s: float) -> None:
        if now_s - self._shared_s >= self._share_every_s:
            self._shared_s = now_s
            await self._share(now_s)

    async def _lead_when_due(self, now_s: float) -> None:
        try:
            if self.is_leader and now_s >= self._leads_from_s:
                await self._lead(now_s)
        except FencedError as error:
            self._step_down(str(error))

    async def _count_when_due(self, now_s: float) -> None:
        if now_s - self._counters_s >= _COUNTERS_EVERY_S:
            self._counters_s = now_s
            workers = self._roster.members(pb.ROLE_WORKER) if self.is_leader else []
            self._worker_totals.note(((worker.member_id, worker.counters) for worker in workers), now_s)
            self._show()

    async def _remember_now(self, now_s: float) -> None:
        await self._remember()

    async def _lead(self, now_s: float) -> None:
        for member in self._roster.expire(now_s):
            self._num_expiries += 1
            _log.warning("lease lapsed", member_id=member.member_id, address=member.address)
            self._forget(member)
            self._note(member.member_id)
        workers = self._roster.members(pb.ROLE_WORKER)
        for worker in self._planner.to_retire(workers):
            worker.state = pb.MEMBER_STATE_RETIRING
            _log.info("retires", member_id=worker.member_id, wanted=self._planner.wanted_workers)
            self._note(worker.member_id)
        match self._planner.wish(workers, now_s):
            case Wish.PLAN:
                await self._plan()
            case Wish.PUBLISH:
                await self._publish(now_s)
            case Wish.GIVE_UP:
                late = self._planner.give_up(workers)
                self._account.decide(f"plan given up: {', '.join(late)} did not get ready")
                _log.warning("plan given up", late=late)
                self._backlog.planned = True
                self._show()
            case Wish.NOTHING:
                await self._look(now_s)
        window = self._windows.roll(now_s, time.time_ns() // 10**6)
        if window is not None:
            self._backlog.note_window(window)
            for worker in workers:
                self._costs.note(worker.member_id, worker.counters)
            self._measure()

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
        now_s = self._clock()
        if request.role == pb.ROLE_WORKER or (request.role == pb.ROLE_ROUTER and request.HasField("model")):
            self._take_model(request)
        member = Member(
            member_id=f"{_ROLES[request.role]}-{secrets.token_hex(5)}",
            role=request.role,
            address=request.address,
            metrics_url=request.metrics_url,
            num_threads=request.num_threads,
            capacity_bytes=request.capacity_bytes,
            failure_domain=request.failure_domain,
            seen_epoch=request.seen_epoch,
            joined_unix_ms=time.time_ns() // 10**6,
        )
        self._hear_epoch(request.seen_epoch)
        twin = self._roster.join(member, now_s)
        if twin is not None:
            self._forget(twin)
            self._note(twin.member_id)
        if request.role == pb.ROLE_WORKER:
            self._planner.worker_joined(now_s, (twin.member_id, member.member_id) if twin else None)
        elif request.role == pb.ROLE_ROUTER and not request.seen_epoch:
            self._windows.expect(member.member_id)
        _log.info("joined", member_id=member.member_id, address=member.address)
        self._note(member.member_id)
        return pb.JoinResponse(member_id=member.member_id, ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Extend a lease."""
        self._require_memory()
        validation.check_renew(request, self._planner.newest_epoch)
        known = self._roster.get(request.member_id)
        if known is not None and known.role == pb.ROLE_WORKER and self._planner.model is None:
            raise self._lapsed(request.member_id)  # the memory lost the model, and workers tell it when they join
        member = self._roster.renew(request.member_id, self._clock())
        if member is None:
            raise self._lapsed(request.member_id)
        self._hear_epoch(max(request.seen_epoch, request.ready_plan))
        member.counters, member.counted_unix_ms = dict(request.counters), time.time_ns() // 10**6
        state = request.state
        if member.state == pb.MEMBER_STATE_RETIRING and state != pb.MEMBER_STATE_DRAINING:
            state = pb.MEMBER_STATE_RETIRING  # not for the worker to say
        is_news = (state, request.ready_plan) != (member.state, member.ready_plan)
        # Workers wait for routers to have seen an epoch before they let go of old copies.
        is_news |= member.role == pb.ROLE_ROUTER and request.seen_epoch > member.seen_epoch
        member.state, member.ready_plan, member.seen_epoch = state, request.ready_plan, request.seen_epoch
        if is_news:
            self._note(member.member_id)
        self._backlog.members.add(member.member_id)
        return pb.RenewResponse(ttl_ms=round(self._roster.ttl_s * 1e3))

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """End a lease."""
        self._require_memory()
        validation.check(request)
        member = self._roster.leave(request.member_id)
        if member is not None:
            _log.info("left", member_id=request.member_id)
            self._forget(member)
            self._note(request.member_id)
        return pb.LeaveResponse()

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:
        """Take what a router's gates have chosen."""
        self._require_memory()
        validation.check(request)
        if self._roster.get(request.member_id) is None:
            raise self._lapsed(request.member_id)
        counts = validation.read_report(request, self._planner.model)
        if self.is_leader:
            self._windows.report(request.member_id, counts, self._clock())
        else:
            self._backlog.reports[request.member_id] = counts
        return pb.ReportLoadResponse()

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        """Note how many workers there should be."""
        self._require_memory()
        self._num_scalings_refused += request.num_workers > self._max_workers
        validation.check_scale(request, self._max_workers)
        if self._planner.model is None:
            raise Unavailable("no worker has joined yet", reason="NO_MODEL", retry_after_s=1.0)
        self._planner.wanted_workers = request.num_workers
        self._backlog.wanted = True
        _log.info("scale", wanted=request.num_workers)
        workers = self._roster.members(pb.ROLE_WORKER)
        self._keep_wanted(workers)
        retiring = [w for w in workers if w.state == pb.MEMBER_STATE_RETIRING] + self._planner.to_retire(workers)
        self._show()
        self._kick.set()
        return pb.ScaleResponse(num_workers=len(workers), retiring=[worker.member_id for worker in retiring])

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: Context) -> pb.GetPlacementResponse:
        """Answer the view, with the newest counters."""
        self._require_memory()
        return pb.GetPlacementResponse(view=self._to_view())

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Context
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        """Stream the view; a watch that breaks casts doubt on its member."""
        self._require_memory()
        validation.check(request)
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

    # --- leading ---

    async def _plan(self) -> None:
        epoch = await self._next_epoch()
        workers = self._roster.members(pb.ROLE_WORKER)
        if self._planner.wish(workers, self._clock()) is not Wish.PLAN:
            return
        before, load = (self._planner.in_force, self._planner.planned), self._load(workers)
        candidates = self._planner.candidates(workers, load)
        plan = await asyncio.to_thread(self._planner.draft, candidates, epoch, load)
        # What it was made for may have changed meanwhile; then the next tick looks again.
        workers = self._roster.members(pb.ROLE_WORKER)
        is_current = {worker.member_id for worker in self._planner.live(workers)} == set(plan.worker_ids)
        is_current &= before == (self._planner.in_force, self._planner.planned) and self.is_leader
        is_current &= self._planner.model is not None
        if is_current and epoch > self._planner.newest_epoch:
            self._adopt(plan)
            _log.info("planned", epoch=plan.epoch, homes=plan.num_homes())

    async def _publish(self, now_s: float) -> None:
        placement = self._planner.publish()
        self._backlog.placement, self._backlog.planned = True, False
        self._account.publish(placement, now_s)
        _log.info("placement in force", epoch=placement.epoch, workers=len(placement.worker_ids))
        await self._remember()
        self._measure()
        self._show()

    async def _look(self, now_s: float) -> None:
        """Look whether the load asks for moves; the arithmetic runs beside the loop."""
        workers = self._roster.members(pb.ROLE_WORKER)
        if not self._rebalance_s or now_s - self._looked_s < self._rebalance_s or not self._planner.can_move(workers):
            return
        self._looked_s = now_s
        base, load = self._planner.in_force, self._load(workers)
        candidates = self._planner.candidates(workers, load)
        proposal = await asyncio.to_thread(self._planner.propose, candidates, load)
        self._account.decide(proposal.decision)
        workers = self._roster.members(pb.ROLE_WORKER)
        if proposal.placement is None or not self._planner.can_move(workers) or self._planner.in_force is not base:
            _log.debug("load looked at", decision=proposal.decision)
            self._show()
            return
        plan = replace(proposal.placement, epoch=await self._next_epoch())
        if not self._planner.can_move(workers) or plan.epoch <= self._planner.newest_epoch or not self.is_leader:
            return
        self._adopt(plan)
        _log.info("planned for load", epoch=plan.epoch, decision=proposal.decision)
        for reason in proposal.reasons:
            _log.debug("move", why=reason)

    def _adopt(self, plan: Placement) -> None:
        self._planner.adopt(plan, self._clock())
        self._num_plans += 1
        self._backlog.planned = True
        self._account.plan(plan, self._planner)
        self._show()

    async def _next_epoch(self) -> int:
        floor = self._planner.newest_epoch
        epoch = floor + 1
        if not self._is_store_lost:
            try:
                epoch = await self._store.next_epoch(floor)
            except StoreError as error:
                self._store_lost(error)
        return max(epoch, self._planner.newest_epoch + 1)

    def _load(self, workers: Sequence[Member]) -> Load:
        if not self._windows.windows:
            return NO_LOAD
        costs = self._costs.fit()
        speeds = {worker.member_id: self._costs.speed_of(worker.member_id, costs) for worker in workers}
        return Load(windows=tuple(self._windows.windows), costs=costs, speeds=speeds)

    def _step_down(self, why: str) -> None:
        if self.is_leader:
            _log.warning("no longer leads", why=why)
        self._token = NO_TOKEN
        self._backlog.drop_leaders()

    # --- the memory ---

    async def _share(self, now_s: float) -> None:
        """Look at what other balancers have written, and keep or take the lead."""
        if self._is_store_lost:
            self._roster.excuse_remote(now_s)
            return
        try:
            token = await self._store.lead(self._balancer_id, self._lead_ttl_s)
            has_come_to_lead = token != NO_TOKEN and not self.is_leader
            memory = await self._store.load(with_windows=has_come_to_lead)
        except StoreError as error:
            self._store_lost(error)
            self._roster.excuse_remote(now_s)
            return
        if token == NO_TOKEN:
            self._step_down("another balancer does")
            self._roster.hand_over(now_s)
        elif has_come_to_lead:
            _log.info("leads", token=token)
            self._leads_from_s = now_s + self._lead_ttl_s
        elif memory.placement.epoch < self._planner.in_force.epoch and not self._backlog.placement:
            _log.warning("Redis has lost what it was told; it is told again")
            self._token = token
            self._tell_all()
            return
        self._token = token
        if memory.has_lost:
            self._tell_all()
        changed = self._roster.merge(memory.members, now_s, unsaved=self._backlog.members)
        for record in memory.members:
            self._hear_epoch(max(record.seen_epoch, record.ready_plan))
        if memory.model is None:
            self._backlog.model |= self.is_leader and self._planner.model is not None
        elif self.is_leader and memory.model != self._planner.model and self._is_model_in_use():
            _log.warning("the model in Redis is not the one that workers serve; it is written again", key="model")
            self._backlog.model = True
        elif not self._backlog.model:
            self._adopt_model(memory.model)
        if has_come_to_lead or not self.is_leader:
            changed |= self._planner.follow(memory.placement, memory.planned, now_s)
            self._planner.see_epoch(memory.newest_epoch)
            self._leaders_balance = memory.balance
            changed |= bool(self._roster.set_retiring(memory.balance.retiring))
        if has_come_to_lead:
            self._windows.clear()
            self._restore_windows(memory.windows)
            self._measure()
        if not self._backlog.wanted:
            self._take_wanted(memory.wanted_workers)
            self._keep_wanted(self._roster.members(pb.ROLE_WORKER))
        if self.is_leader:
            for router_id, counts in memory.reports.items():
                member = self._roster.get(router_id)
                if member is not None and member.is_remote:
                    self._windows.report(router_id, counts, now_s)
            await self._save_balance()
        if changed:
            self._show()

    def _take_wanted(self, num_workers: int) -> None:
        """Take how many workers are remembered as wanted; 0 is never wanted, so it means that nothing is remembered."""
        if num_workers > self._max_workers:
            _log.warning(
                "the number of workers in Redis is above the maximum and is dropped",
                key="wanted",
                wanted=num_workers,
                maximum=self._max_workers,
            )
        if 0 < num_workers <= self._max_workers:
            self._planner.wanted_workers = num_workers
        elif self.is_leader or num_workers:
            self._backlog.wanted = self._planner.wanted_workers != num_workers

    async def _save_balance(self) -> None:
        try:
            await self._store.save_balance(self._own_balance(), self._token)
        except StoreError as error:
            self._store_lost(error)
        except FencedError as error:
            self._step_down(str(error))

    async def _remember(self) -> None:
        # Write what the memory has not got yet; while it is away, try once a second.
        if (self._backlog.is_empty and not self._is_store_lost) or self._clock() < self._store_retry_s:
            return
        try:
            await self._backlog.write_members(self._store, self._roster)
            if self._is_store_lost:
                await self._store_returned()
            await self._backlog.write_rest(self._store, self._planner, self._token)
        except StoreError as error:
            self._store_lost(error)
        except FencedError as error:
            self._step_down(str(error))

    def _store_lost(self, error: StoreError) -> None:
        if not self._is_store_lost:
            _log.warning("Redis is away; going on from memory", why=str(error))
        self._is_store_lost = True
        self._num_store_failures += 1
        self._store_retry_s = self._clock() + _STORE_RETRY_S

    async def _store_returned(self) -> None:
        # Nobody is to use again an epoch that was handed out meanwhile.
        self._planner.see_epoch(await self._store.next_epoch(self._planner.newest_epoch))
        _log.info("Redis is back")
        self._is_store_lost = False
        if self.is_leader:
            token = await self._store.lead(self._balancer_id, self._lead_ttl_s)
            if token == NO_TOKEN:
                self._step_down("another balancer came to lead while Redis was away")
            self._token = token
        self._tell_all()

    def _tell_all(self) -> None:
        self._backlog.mark_all(self._roster, self._planner, self._windows.windows, is_leader=self.is_leader)

    # --- what changes ---

    def _take_model(self, request: pb.JoinRequest) -> None:
        model = from_shape(request.model)
        known = self._planner.model
        others = [worker for worker in self._roster.members(pb.ROLE_WORKER) if worker.address != request.address]
        if known is not None and others:
            told = tell_other_model(model.digest, model.parts, known.digest, known.parts)
            if told:
                raise FailedPrecondition(
                    f"this {_ROLES[request.role]} serves another model than the cluster's workers: {told}",
                    reason="OTHER_MODEL",
                    field="model.digest",
                    remedy="give every worker and router the same checkpoint and dtype",
                )
        if request.role != pb.ROLE_WORKER:  # the workers' model is the cluster's
            return
        if known is not None:
            is_in_use = bool(others) or self._planner.in_force.has_shape(known.layers)
            validation.check_same_shape(known, model, is_in_use=is_in_use)
        self._adopt_model(model)
        self._backlog.model = True

    def _hear_epoch(self, epoch: int) -> None:
        """Learn of an epoch that a member tells; none raises ours beyond what leaves room to count on."""
        self._planner.see_epoch(min(epoch, validation.MAX_TOLD_EPOCH))

    def _is_model_in_use(self) -> bool:
        """Return True if workers live that experts of the known model are placed on."""
        placed = set(self._planner.in_force.worker_ids)
        workers = self._roster.members(pb.ROLE_WORKER)
        return self._planner.model is not None and any(worker.member_id in placed for worker in workers)

    def _adopt_model(self, model: Model) -> None:
        known = self._planner.model
        if known is not None and known.digest != model.digest:
            self._windows.clear()
            self._backlog.windows.clear()
            self._backlog.are_windows_anew = self.is_leader
        self._planner.adopt_model(model)

    def _restore_windows(self, windows: Sequence[Window]) -> None:
        model = self._planner.model
        if model is not None and has_even_layers(model.layers):
            self._windows.restore(windows, (len(model.layers), model.layers[0].num_experts))

    def _keep_wanted(self, workers: Sequence[Member]) -> None:
        """Let workers that retire go on where they are wanted again."""
        for worker in self._planner.to_keep(workers):
            worker.state = pb.MEMBER_STATE_SERVING
            self._note(worker.member_id)

    def _lapsed(self, member_id: str) -> NotFound:
        return NotFound(
            f"no lease {shown(member_id)}: it has lapsed, or never was",
            reason="LEASE_LAPSED",
            field="member_id",
            remedy="join again",
        )

    def _require_memory(self) -> None:
        if not self._is_loaded:
            raise Unavailable("the balancer has not reached its memory yet", reason="NO_MEMORY", retry_after_s=0.5)

    def _forget(self, member: Member) -> None:
        self._windows.forget(member.member_id)
        self._costs.forget(member.member_id)

    def _note(self, member_id: str) -> None:
        # A member changed: write it, tell the watchers, and let the loop look at it now.
        self._backlog.members.add(member_id)
        self._show()
        self._kick.set()

    def _measure(self) -> None:
        self._account.measure(self._planner, self._windows.windows)

    def _own_balance(self) -> pb.Balance:
        workers = self._roster.members(pb.ROLE_WORKER)
        return self._account.to_message(
            self._clock(),
            retiring=[worker.member_id for worker in workers if worker.state == pb.MEMBER_STATE_RETIRING],
            costs=self._costs.fit(),
            num_windows=len(self._windows.windows),
            is_leader=self.is_leader,
            has_memory=not self._is_store_lost,
        )

    def _to_view(self) -> pb.WatchPlacementResponse:
        balance = self._own_balance()
        if (
            not self.is_leader and self._leaders_balance is not None
        ):  # a follower knows of the load what the leader says
            balance.CopyFrom(self._leaders_balance)
            balance.is_leader, balance.has_memory = False, not self._is_store_lost
        return to_view(self._roster, self._planner, balance)

    def _show(self) -> None:
        self._view = self._to_view()
        self._view_changed.set()
        self._view_changed = asyncio.Event()
