"""The balancer at work: its parts put together, and the one loop that turns changes into epochs.

Owns the ticks. All parts live on one event loop: RPCs change the roster (rpcs.py), the loop shares with other
balancers and writes what is to be remembered (memory.py), and of several balancers the one that leads plans and
publishes (leadership.py, leading.py); the others follow what it wrote.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from balancer_svc.backlog import Backlog
from balancer_svc.leadership import Leadership
from balancer_svc.leading import Leader
from balancer_svc.memory import Memory
from balancer_svc.news import News
from balancer_svc.planner import Planner
from balancer_svc.roster import Roster
from balancer_svc.rpcs import ROLES, BalancerRpcs
from balancer_svc.state import ClusterState
from balancer_svc.store import FencedError, Store
from balancer_svc.worker_totals import WorkerTotals
from collegium.fabric import logs
from collegium.fabric.bounds import MAX_MEMBERS
from collegium.fabric.faults import Faults

_TICK_S = 0.1
_COUNTERS_EVERY_S = 1.0
_SHARE_EVERY_S = 1.0  # how often balancers look at what the others have written, at least
_LONGEST_PAUSE_S = 2.0  # of a part of the tick that fails

_log = logs.get("balancer")


class Balancer:
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
        backlog = Backlog()
        self._state = ClusterState(roster, planner, window_s=window_s, clock=clock)
        self.leadership = Leadership(store, ttl_s=lead_ttl_s, on_step_down=backlog.drop_leaders)
        self.memory = Memory(store, self._state, self.leadership, backlog, max_workers=max_workers)
        self.news = News(self._state, self.leadership, self.memory)
        self.rpcs = BalancerRpcs(
            self._state, self.leadership, self.memory, self.news, max_workers=max_workers, max_members=max_members
        )
        self._leader = Leader(self._state, self.leadership, self.memory, self.news, rebalance_s=rebalance_s)
        self._worker_totals = WorkerTotals(window_s)
        self._share_every_s = min(_SHARE_EVERY_S, lead_ttl_s / 3)
        self._counters_s = self.shared_s = clock()
        self._parts: Sequence[tuple[Callable[[float], Awaitable[None]], Faults]] = [
            (part, Faults(_log, what, longest_pause_s=_LONGEST_PAUSE_S, clock=clock))
            for part, what in (
                (self._share_when_due, "sharing with other balancers"),
                (self._lead_when_due, "leading"),
                (self._count_when_due, "adding up the workers"),
                (self._remember, "writing to Redis"),
            )
        ]

    @property
    def num_faults(self) -> int:
        """How many parts of ticks have failed by a fault of ours."""
        return sum(faults.num_faults for _, faults in self._parts)

    def counters(self) -> Mapping[str, float]:
        """Count members, plans, moves, expiries, failures of the memory, and say how even the load is, by series."""
        roster, planner, is_leader = self._state.roster, self._state.planner, self.leadership.is_leader
        return {
            **{f'collegium_members{{role="{name}"}}': float(len(roster.members(role))) for role, name in ROLES.items()},
            "collegium_published_epoch": float(planner.in_force.epoch),
            "collegium_loop_faults_total": float(self.num_faults),
            "collegium_balancer_is_leader": float(is_leader),
            **self._leader.counters(),
            **self.memory.counters(),
            **self.rpcs.counters(),
            **self._state.account.counters(self._state.clock()),
            # Only the leader exports worker totals, so dashboards can sum over balancers.
            **(self._worker_totals.counters() if is_leader else {}),
        }

    async def load(self) -> None:
        """Take up what is remembered; StoreError if the memory cannot be reached."""
        await self.memory.load()
        self._state.measure()
        self.news.show()

    async def run(self) -> None:
        """Expire leases, plan, publish and write, until `end`."""
        kick = self.news.kick
        while not self.news.is_over:
            try:
                async with asyncio.timeout(_TICK_S):
                    await kick.wait()
            except TimeoutError:
                pass
            kick.clear()
            await self.tick()

    def end(self) -> None:
        """End all watches, and `run` after what it is doing."""
        self.news.end()

    async def resign(self) -> None:
        """Give the lead back, so that another balancer need not wait for it."""
        if self.leadership.is_leader and not self.memory.is_lost:
            await self.leadership.resign()

    async def tick(self) -> None:
        """Do once what is due now. What a part raises is logged once per kind, and that part is tried again later."""
        now_s = self._state.clock()
        for part, faults in self._parts:
            if now_s < faults.again_s:
                continue
            try:
                await part(now_s)
            except Exception as error:
                faults.note(error)
            else:
                faults.clear()

    async def _share_when_due(self, now_s: float) -> None:
        if now_s - self.shared_s >= self._share_every_s:
            self.shared_s = now_s
            if await self.memory.share(now_s):
                self.news.show()

    async def _lead_when_due(self, now_s: float) -> None:
        try:
            if self.leadership.has_begun(now_s):
                await self._leader.lead(now_s)
        except FencedError as error:
            self.leadership.step_down(str(error))

    async def _count_when_due(self, now_s: float) -> None:
        if now_s - self._counters_s >= _COUNTERS_EVERY_S:
            self._counters_s = now_s
            workers = self._state.workers() if self.leadership.is_leader else []
            self._worker_totals.note(((worker.member_id, worker.counters) for worker in workers), now_s)
            self.news.show()

    async def _remember(self, now_s: float) -> None:
        await self.memory.write()
