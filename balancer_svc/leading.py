"""What the balancer that leads does at each tick: expire leases, retire workers, plan, publish, look at the load.

Owns when the load is looked at. What is to be done is the planner's to say; only its arithmetic runs beside the
loop, in a thread, so what a plan was made for is looked at again before it is adopted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from balancer_svc.leadership import Leadership
from balancer_svc.memory import Memory
from balancer_svc.news import News
from balancer_svc.planner import Wish
from balancer_svc.roster import Member
from balancer_svc.state import ClusterState
from collegium.fabric import logs
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb

_log = logs.get("balancer")


class Leader:
    """Owned by the balancer's event loop."""

    def __init__(
        self, state: ClusterState, leadership: Leadership, memory: Memory, news: News, *, rebalance_s: float
    ) -> None:
        """rebalance_s: time between looks at the load; 0: homes follow members alone."""
        self._state, self._leadership, self._memory, self._news = state, leadership, memory, news
        self._roster, self._planner = state.roster, state.planner
        self._rebalance_s = rebalance_s
        self._looked_s = state.clock()
        self._num_expiries = 0
        self._num_plans = 0

    def counters(self) -> Mapping[str, float]:
        """Count expired leases and plans, by series."""
        return {
            "collegium_lease_expiries_total": float(self._num_expiries),
            "collegium_plans_total": float(self._num_plans),
        }

    async def lead(self, now_s: float) -> None:
        """Do what is due now. Raises FencedError if another balancer has come to lead."""
        self._expire(now_s)
        workers = self._state.workers()
        self._retire(workers)
        match self._planner.wish(workers, now_s):
            case Wish.PLAN:
                await self._plan()
            case Wish.PUBLISH:
                await self._publish(now_s)
            case Wish.GIVE_UP:
                self._give_up(workers)
            case Wish.NOTHING:
                await self._look(now_s)
        self._roll(workers, now_s)

    def _expire(self, now_s: float) -> None:
        for member in self._roster.expire(now_s):
            self._num_expiries += 1
            _log.warning("lease lapsed", member_id=member.member_id, address=member.address)
            self._state.forget(member)
            self._news.note(member.member_id)

    def _retire(self, workers: Sequence[Member]) -> None:
        for worker in self._planner.to_retire(workers):
            worker.state = pb.MEMBER_STATE_RETIRING
            _log.info("retires", member_id=worker.member_id, wanted=self._planner.wanted_workers)
            self._news.note(worker.member_id)

    async def _plan(self) -> None:
        """Plan for the members that there are, and adopt the plan if they are still the same afterwards."""
        epoch = await self._memory.next_epoch()
        workers = self._state.workers()
        if self._planner.wish(workers, self._state.clock()) is not Wish.PLAN:
            return
        before, load = (self._planner.in_force, self._planner.planned), self._state.load(workers)
        candidates = self._planner.candidates(workers, load)
        plan = await asyncio.to_thread(self._planner.draft, candidates, epoch, load)
        # What it was made for may have changed meanwhile; then the next tick looks again.
        live = {worker.member_id for worker in self._planner.live(self._state.workers())}
        is_current = live == set(plan.worker_ids)
        is_current &= before == (self._planner.in_force, self._planner.planned) and self._leadership.is_leader
        is_current &= self._planner.model is not None
        if is_current and epoch > self._planner.newest_epoch:
            self._adopt(plan)
            _log.info("planned", epoch=plan.epoch, homes=plan.num_homes())

    async def _publish(self, now_s: float) -> None:
        placement = self._planner.publish()
        self._memory.backlog.placement, self._memory.backlog.planned = True, False
        self._state.account.publish(placement, now_s)
        _log.info("placement in force", epoch=placement.epoch, workers=len(placement.worker_ids))
        await self._memory.write()
        self._state.measure()
        self._news.show()

    def _give_up(self, workers: Sequence[Member]) -> None:
        late = self._planner.give_up(workers)
        self._state.account.decide(f"plan given up: {', '.join(late)} did not get ready")
        _log.warning("plan given up", late=late)
        self._memory.backlog.planned = True
        self._news.show()

    async def _look(self, now_s: float) -> None:
        """Look whether the load asks for moves."""
        workers = self._state.workers()
        if not self._rebalance_s or now_s - self._looked_s < self._rebalance_s or not self._planner.can_move(workers):
            return
        self._looked_s = now_s
        base, load = self._planner.in_force, self._state.load(workers)
        candidates = self._planner.candidates(workers, load)
        proposal = await asyncio.to_thread(self._planner.propose, candidates, load)
        self._state.account.decide(proposal.decision)
        workers = self._state.workers()
        if proposal.placement is None or not self._planner.can_move(workers) or self._planner.in_force is not base:
            _log.debug("load looked at", decision=proposal.decision)
            self._news.show()
            return
        plan = replace(proposal.placement, epoch=await self._memory.next_epoch())
        is_current = self._planner.can_move(workers) and self._leadership.is_leader
        if not is_current or plan.epoch <= self._planner.newest_epoch:
            return
        self._adopt(plan)
        _log.info("planned for load", epoch=plan.epoch, decision=proposal.decision)
        for reason in proposal.reasons:
            _log.debug("move", why=reason)

    def _adopt(self, plan: Placement) -> None:
        self._planner.adopt(plan, self._state.clock())
        self._num_plans += 1
        self._memory.backlog.planned = True
        assert self._planner.model is not None, "a plan needs a model"
        self._state.account.plan(plan, self._planner.in_force, self._planner.model.layers)
        self._news.show()

    def _roll(self, workers: Sequence[Member], now_s: float) -> None:
        """Close the load window if its time is over."""
        window = self._state.windows.roll(now_s, time.time_ns() // 10**6)
        if window is not None:
            self._memory.backlog.note_window(window)
            for worker in workers:
                self._state.costs.note(worker.member_id, worker.counters)
            self._state.measure()
