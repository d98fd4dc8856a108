"""When to plan and when to publish: the life of a placement from plan to force.

Owns the placement in force, the planned one, the epochs, and how many workers are wanted. Pure: told the time, the
workers, the load and the epoch to use; how homes are chosen is rebalancing's if there is a load to go by. Until one has
been seen, collegium.model.placement shares experts out by count.

A plan names every live worker. It comes into force when each of them says that its homes are resident, so there is
never a moment in which an expert has lost its old home and not yet got a new one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from balancer_svc.costs import Costs
from balancer_svc.load_windows import Window
from balancer_svc.model import Model
from balancer_svc.rebalancing import Candidate, Proposal, Rules, lacking, propose
from balancer_svc.roster import Member
from collegium.model.placement import NO_PLACEMENT, Placement, Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is known of the load: windows, oldest first, what things cost, and how fast workers are, by id."""

    windows: tuple[Window, ...] = ()
    costs: Costs = field(default_factory=Costs)
    speeds: Mapping[str, float] = field(default_factory=dict[str, float])


NO_LOAD = Load()


class Wish(enum.Enum):
    """What the planner wants done now."""

    NOTHING = "nothing"
    PLAN = "plan"
    PUBLISH = "publish"
    GIVE_UP = "give up"  # a plan whose worker does not get ready


class Planner:
    """Decides; the service acts."""

    def __init__(
        self,
        *,
        expected_workers: int,
        settle_s: float,
        patience_s: float,
        rules: Rules | None = None,
        ready_limit_s: float = 60.0,
    ) -> None:
        self._expected_workers = expected_workers
        self._settle_s = settle_s
        self._patience_s = patience_s
        self._first_join_s = 0.0
        self._last_join_s = 0.0
        self.model: Model | None = None
        self.in_force: Placement = NO_PLACEMENT
        self.planned: Placement | None = None
        self.newest_epoch = 0
        self.wanted_workers = 0  # 0: as many as come
        self.rules = rules or Rules()
        self._ready_limit_s = ready_limit_s
        self._planned_s = 0.0
        self._late: dict[str, int] = {}  # workers that did not get ready, by the plan that they had got ready for
        self._base: Placement | None = None  # what the next plan starts from; None: the newest placement

    def restore(self, model: Model | None, placement: Placement) -> None:
        """Take up what is remembered."""
        self.model, self.in_force = model, placement
        self.see_epoch(placement.epoch)

    def see_epoch(self, epoch: int) -> None:
        """Learn of an epoch that somebody has seen: later ones go above it."""
        self.newest_epoch = max(self.newest_epoch, epoch)

    def adopt_model(self, model: Model) -> None:
        """Change the model of the cluster: what was placed for another one counts no more."""
        if self.model is not None and self.model.digest != model.digest:
            self.planned, self._base = None, NO_PLACEMENT
        self.model = model

    def worker_joined(self, now_s: float, replaces: tuple[str, str] | None = None) -> None:
        """Note a new worker; (old id, new id) where it is an old one under a new lease, whose homes it keeps."""
        self._first_join_s = self._first_join_s or now_s
        self._last_join_s = now_s
        if replaces is not None:
            # Only a plan may carry the new name: what is in force is immutable under its epoch.
            self._base = (self._base or self.planned or self.in_force).renamed({replaces[0]: replaces[1]})
            self.planned = None

    def wish(self, workers: Sequence[Member], now_s: float) -> Wish:
        """Say what is to be done, given the members that are workers."""
        live = self.live(workers)
        ids = {worker.member_id for worker in live}
        if self.planned is not None and set(self.planned.worker_ids) == ids and self._fits(self.planned):
            planned = self.planned
            if all(worker.ready_plan >= planned.epoch for worker in live):
                return Wish.PUBLISH
            return Wish.GIVE_UP if now_s - self._planned_s > self._ready_limit_s else Wish.NOTHING
        if self.model is None or not live or not all(worker.is_confirmed for worker in live):
            return Wish.NOTHING
        if self.planned is None and set(self.in_force.worker_ids) == ids and self._fits(self.in_force):
            return Wish.NOTHING
        if (
            self.planned is None
            and ids.isdisjoint(self.in_force.worker_ids)
            and not self._has_settled(len(live), now_s)
        ):
            return Wish.NOTHING
        return Wish.PLAN

    def plan(self, workers: Sequence[Member], epoch: int, load: Load = NO_LOAD, now_s: float = 0.0) -> Placement:
        """Plan for the live workers under a new epoch, which must be above all that were seen."""
        planned = self.draft(self.candidates(workers, load), epoch, load)
        self.adopt(planned, now_s)
        return planned

    def draft(self, candidates: Sequence[Candidate], epoch: int, load: Load = NO_LOAD) -> Placement:
        """Work out a plan for candidates, of which there must be one; changes nothing. Takes its time.

        May run in another thread: it looks at no member, who may begin to leave meanwhile.
        """
        assert self.model is not None, "a plan needs a model"
        base = self._base or self.planned or self.in_force
        if not lacking(load.windows, self.model.layers):
            # Homes of those that are gone must be given to others whatever it costs: the budget is for the rest.
            proposal = propose(self.model.layers, candidates, base, load.windows, load.costs, self.rules, epoch=epoch)
            return proposal.placement or replace(base, epoch=epoch)
        return plan_homes(self.model.layers, [one.worker for one in candidates], base, epoch=epoch)

    def propose(self, candidates: Sequence[Candidate], load: Load) -> Proposal:
        """Look whether the placement in force should change for the load; changes nothing. As `draft` otherwise."""
        assert self.model is not None
        why_not = lacking(load.windows, self.model.layers)
        if why_not:
            return Proposal(placement=None, decision=why_not)
        return propose(
            self.model.layers,
            candidates,
            self.in_force,
            load.windows,
            load.costs,
            self.rules,
            epoch=0,
        )

    def can_move(self, workers: Sequence[Member]) -> bool:
        """Whether nothing is under way and the placement in force is that of the live workers."""
        live = {worker.member_id for worker in self.live(workers)}
        has_settled = self.planned is None and live == set(self.in_force.worker_ids) != set()
        return self.model is not None and has_settled and self._fits(self.in_force)

    def adopt(self, planned: Placement, now_s: float) -> None:
        """Make a placement the planned one; its epoch must be above all that were seen."""
        assert planned.epoch > self.newest_epoch, "a plan needs a new epoch"
        self.planned, self.newest_epoch, self._base, self._planned_s = planned, planned.epoch, None, now_s

    def give_up(self, workers: Sequence[Member]) -> list[str]:
        """Forget the plan, and say who did not get ready for it.

        What is in force does well without a plan for the same workers. Another one must come about: it is made without
        those who were late, until they say that they have loaded something after all.
        """
        assert self.planned is not None
        live = self.live(workers)
        late = {worker.member_id: worker.ready_plan for worker in live if worker.ready_plan < self.planned.epoch}
        if {worker.member_id for worker in live} != set(self.in_force.worker_ids):
            self._late |= late
        self.planned = None
        return sorted(late)

    def live(self, workers: Sequence[Member]) -> list[Member]:
        """Name the workers that can have homes: they stay, and they can load."""
        return [
            worker
            for worker in workers
            if not worker.is_leaving and self._late.get(worker.member_id) != worker.ready_plan
        ]

    def follow(self, placement: Placement, planned: Placement | None, now_s: float) -> bool:
        """Take what the balancer that leads has published and planned; gives whether it is news."""
        self._base = None
        if planned is not None and (self.planned is None or self.planned.epoch != planned.epoch):
            self._planned_s = now_s
        before = (self.in_force.epoch, self.planned.epoch if self.planned is not None else 0)
        if placement.epoch >= self.in_force.epoch:
            self.in_force = placement
        self.planned = planned if planned is not None and planned.epoch > self.in_force.epoch else None
        self.see_epoch(max(self.in_force.epoch, self.planned.epoch if self.planned is not None else 0))
        return before != (self.in_force.epoch, self.planned.epoch if self.planned is not None else 0)

    def candidates(self, workers: Sequence[Member], load: Load) -> list[Candidate]:
        """Describe the workers that can be home to experts."""
        return [
            Candidate(
                worker=Worker(worker_id=worker.member_id, capacity_bytes=worker.capacity_bytes),
                speed=load.speeds.get(worker.member_id, 1.0),
                domain=worker.failure_domain or worker.address.rpartition(":")[0],
            )
            for worker in self.live(workers)
        ]

    def to_retire(self, workers: Sequence[Member]) -> list[Member]:
        """Say which workers are too many: the newest go first; those that leave anyway count as gone."""
        if not self.wanted_workers:
            return []
        staying = [worker for worker in workers if not worker.is_leaving]
        return sorted(staying, key=lambda worker: worker.joined_unix_ms)[self.wanted_workers :]

    def to_keep(self, workers: Sequence[Member]) -> list[Member]:
        """Say which of the workers that retire are wanted again, the oldest first."""
        retiring = [worker for worker in workers if worker.state == pb.MEMBER_STATE_RETIRING]
        num_staying = sum(not worker.is_leaving for worker in workers)
        num_lacking = len(retiring) if not self.wanted_workers else max(0, self.wanted_workers - num_staying)
        return sorted(retiring, key=lambda worker: worker.joined_unix_ms)[:num_lacking]

    def publish(self) -> Placement:
        """Bring the plan into force."""
        assert self.planned is not None, "nothing is planned"
        self.in_force, self.planned = self.planned, None
        return self.in_force

    def _fits(self, placement: Placement) -> bool:
        # What was remembered, or another balancer wrote, may be of another model.
        return self.model is None or placement.has_shape(self.model.layers)

    def _has_settled(self, num_live: int, now_s: float) -> bool:
        if self._expected_workers:
            is_patience_over = now_s - self._first_join_s >= self._patience_s
            return num_live >= self._expected_workers or is_patience_over
        return now_s - self._last_join_s >= self._settle_s
