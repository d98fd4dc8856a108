"""What a balancer keeps in the shared memory, and how it is read back.

Owns whether the memory can be reached, the backlog of what it has not got yet, and the number of workers that it
says are wanted. A memory that is away delays nothing: what it missed is written when it is back. The store behind it
is an interface (store.py); who leads is leadership.py's.
"""

from __future__ import annotations

from collections.abc import Mapping

from balancer_svc.backlog import Backlog
from balancer_svc.leadership import Leadership
from balancer_svc.model import Model
from balancer_svc.state import ClusterState
from balancer_svc.store import NO_TOKEN, FencedError, Remembered, Store, StoreError
from collegium.fabric import logs
from collegium.v1 import balancer_pb2 as pb

_RETRY_S = 1.0

_log = logs.get("balancer")


class Memory:
    """Owned by the balancer's event loop; call load() once, then share() and write() for as long as it serves."""

    def __init__(
        self,
        store: Store,
        state: ClusterState,
        leadership: Leadership,
        backlog: Backlog,
        *,
        max_workers: int,
    ) -> None:
        """max_workers: the most workers that may be wanted; more than that in the memory is dropped."""
        self.is_loaded = False
        self.is_lost = False
        self.backlog = backlog
        self.leaders_balance: pb.Balance | None = None  # what the leader says of the load, for those that follow
        self._store, self._state, self._leadership = store, state, leadership
        self._max_workers = max_workers
        self._retry_s = 0.0
        self._num_failures = 0

    def counters(self) -> Mapping[str, float]:
        """Say whether the memory is there, and count its failures, by series."""
        return {
            "collegium_store_failures_total": float(self._num_failures),
            "collegium_balancer_has_memory": float(not self.is_lost),
        }

    async def load(self) -> None:
        """Take up what is remembered; StoreError if the memory cannot be reached."""
        memory = await self._store.load()
        model = memory.model
        if model is not None and memory.placement.epoch and not memory.placement.has_shape(model.layers):
            _log.warning("the model in Redis does not fit the placement there and is dropped", key="model")
            model = None
        planner, now_s = self._state.planner, self._state.clock()
        planner.restore(model, memory.placement)
        planner.follow(memory.placement, memory.planned, now_s)
        planner.see_epoch(memory.newest_epoch)
        self._take_wanted(memory.wanted_workers)
        self._state.restore_windows(memory.windows)
        self._state.roster.restore(memory.members, now_s)
        self._leadership.token = await self._leadership.ask()
        self.is_loaded = True
        _log.info(
            "remembered",
            members=len(memory.members),
            epoch=memory.placement.epoch,
            windows=len(memory.windows),
            leads=self._leadership.is_leader,
        )

    async def share(self, now_s: float) -> bool:
        """Keep or take the lead, and take what other balancers have written. Returns True if the view changed."""
        if self.is_lost:
            self._state.roster.excuse_remote(now_s)
            return False
        leadership, planner = self._leadership, self._state.planner
        try:
            token = await leadership.ask()
            has_come_to_lead = token != NO_TOKEN and not leadership.is_leader
            memory = await self._store.load(with_windows=has_come_to_lead)
        except StoreError as error:
            self.lose(error)
            self._state.roster.excuse_remote(now_s)
            return False
        leadership.hear(token, now_s)
        if token == NO_TOKEN:
            self._state.roster.hand_over(now_s)
        elif not has_come_to_lead and memory.placement.epoch < planner.in_force.epoch and not self.backlog.placement:
            _log.warning("Redis has lost what it was told; it is told again")
            self._tell_all()
            return False
        if memory.has_lost:
            self._tell_all()
        has_changed = self._merge(memory, now_s, has_come_to_lead=has_come_to_lead)
        if leadership.is_leader:
            self._hear_reports(memory, now_s)
            await self._save_balance()
        return has_changed

    async def write(self) -> None:
        """Write what the memory has not got yet; while it is away, try once a second."""
        if (self.backlog.is_empty and not self.is_lost) or self._state.clock() < self._retry_s:
            return
        try:
            await self.backlog.write_members(self._store, self._state.roster)
            if self.is_lost:
                await self._come_back()
            await self.backlog.write_rest(self._store, self._state.planner, self._leadership.token)
        except StoreError as error:
            self.lose(error)
        except FencedError as error:
            self._leadership.step_down(str(error))

    async def next_epoch(self) -> int:
        """Reserve an epoch above all that were seen; while the memory is away, by our own knowledge alone."""
        planner = self._state.planner
        floor = planner.newest_epoch
        epoch = floor + 1
        if not self.is_lost:
            try:
                epoch = await self._store.next_epoch(floor)
            except StoreError as error:
                self.lose(error)
        return max(epoch, planner.newest_epoch + 1)

    def adopt_model(self, model: Model) -> None:
        """Make this the cluster's model; windows of load under another one are forgotten here as well."""
        if self._state.adopt_model(model):
            self.backlog.windows.clear()
            self.backlog.are_windows_anew = self._leadership.is_leader

    def lose(self, error: StoreError) -> None:
        """Note that the memory cannot be reached."""
        if not self.is_lost:
            _log.warning("Redis is away; going on from memory", why=str(error))
        self.is_lost = True
        self._num_failures += 1
        self._retry_s = self._state.clock() + _RETRY_S

    def to_balance(self) -> pb.Balance:
        """Write this balancer's account as the memory is to have it."""
        return self._state.to_balance(is_leader=self._leadership.is_leader, has_memory=not self.is_lost)

    def _merge(self, memory: Remembered, now_s: float, *, has_come_to_lead: bool) -> bool:
        """Take what the others wrote, except where this balancer knows better. Returns True if the view changed."""
        state, planner, is_leader = self._state, self._state.planner, self._leadership.is_leader
        has_changed = state.roster.merge(memory.members, now_s, unsaved=self.backlog.members)
        for record in memory.members:
            state.hear_epoch(max(record.seen_epoch, record.ready_plan))
        self._merge_model(memory.model)
        if has_come_to_lead or not is_leader:
            has_changed |= planner.follow(memory.placement, memory.planned, now_s)
            planner.see_epoch(memory.newest_epoch)
            self.leaders_balance = memory.balance
            has_changed |= bool(state.roster.set_retiring(memory.balance.retiring))
        if has_come_to_lead:
            state.windows.clear()
            state.restore_windows(memory.windows)
            state.measure()
        if not self.backlog.wanted:
            self._take_wanted(memory.wanted_workers)
            kept = [worker.member_id for worker in state.keep_wanted()]
            self.backlog.members.update(kept)
            has_changed |= bool(kept)
        return has_changed

    def _merge_model(self, model: Model | None) -> None:
        state, is_leader = self._state, self._leadership.is_leader
        if model is None:
            self.backlog.model |= is_leader and state.planner.model is not None
        elif is_leader and model != state.planner.model and state.is_model_in_use():
            _log.warning("the model in Redis is not the one that workers serve; it is written again", key="model")
            self.backlog.model = True
        elif not self.backlog.model:
            self.adopt_model(model)

    def _hear_reports(self, memory: Remembered, now_s: float) -> None:
        """Take the counts that routers gave to other balancers."""
        for router_id, counts in memory.reports.items():
            member = self._state.roster.get(router_id)
            if member is not None and member.is_remote:
                self._state.windows.report(router_id, counts, now_s)

    def _take_wanted(self, num_workers: int) -> None:
        """Take how many workers are remembered as wanted; 0 is never wanted, so it means that nothing is remembered."""
        if num_workers > self._max_workers:
            _log.warning(
                "the number of workers in Redis is above the maximum and is dropped",
                key="wanted",
                wanted=num_workers,
                maximum=self._max_workers,
            )
        planner = self._state.planner
        if 0 < num_workers <= self._max_workers:
            planner.wanted_workers = num_workers
        elif self._leadership.is_leader or num_workers:
            self.backlog.wanted = planner.wanted_workers != num_workers

    async def _save_balance(self) -> None:
        try:
            await self._store.save_balance(self.to_balance(), self._leadership.token)
        except StoreError as error:
            self.lose(error)
        except FencedError as error:
            self._leadership.step_down(str(error))

    async def _come_back(self) -> None:
        # Nobody is to use again an epoch that was handed out meanwhile.
        planner = self._state.planner
        planner.see_epoch(await self._store.next_epoch(planner.newest_epoch))
        _log.info("Redis is back")
        self.is_lost = False
        if self._leadership.is_leader:
            token, why_not = await self._leadership.ask(), "another balancer came to lead while Redis was away"
            self._leadership.hear(token, self._state.clock(), why_not=why_not)
        self._tell_all()

    def _tell_all(self) -> None:
        state, is_leader = self._state, self._leadership.is_leader
        self.backlog.mark_all(state.roster, state.planner, state.windows.windows, is_leader=is_leader)
