"""When to plan and when to publish: the life of a placement from plan to force.

Owns the placement in force, the planned one, and the epochs. Pure: told the time, the workers and the epoch to use; how
homes are chosen is collegium.model.placement's.

A plan names every live worker. It comes into force when each of them says that its homes are resident, so there is
never a moment in which an expert has lost its old home and not yet got a new one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from balancer_svc.roster import Member
from collegium.model.placement import NO_PLACEMENT, LayerSize, Placement, Worker, plan_homes


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What placement needs to know of the model; equal digests mean equal checkpoints."""

    digest: str
    layers: tuple[LayerSize, ...]


class Wish(enum.Enum):
    """What the planner wants done now."""

    NOTHING = "nothing"
    PLAN = "plan"
    PUBLISH = "publish"


class Planner:
    """Decides; the service acts."""

    def __init__(self, *, expected_workers: int, settle_s: float, patience_s: float) -> None:
        self._expected_workers = expected_workers
        self._settle_s = settle_s
        self._patience_s = patience_s
        self._first_join_s = 0.0
        self._last_join_s = 0.0
        self.model: Model | None = None
        self.in_force: Placement = NO_PLACEMENT
        self.planned: Placement | None = None
        self.newest_epoch = 0
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
        live = [worker for worker in workers if not worker.is_leaving]
        ids = {worker.member_id for worker in live}
        if self.planned is not None and set(self.planned.worker_ids) == ids:
            planned = self.planned
            return Wish.PUBLISH if all(worker.ready_plan >= planned.epoch for worker in live) else Wish.NOTHING
        if self.model is None or not live or not all(worker.is_confirmed for worker in live):
            return Wish.NOTHING
        if self.planned is None and set(self.in_force.worker_ids) == ids:
            return Wish.NOTHING
        if (
            self.planned is None
            and ids.isdisjoint(self.in_force.worker_ids)
            and not self._has_settled(len(live), now_s)
        ):
            return Wish.NOTHING
        return Wish.PLAN

    def plan(self, workers: Sequence[Member], epoch: int) -> Placement:
        """Plan for the live workers under a new epoch, which must be above all that were seen."""
        assert self.model is not None and epoch > self.newest_epoch, "a plan needs a model and a new epoch"
        live = [
            Worker(worker_id=worker.member_id, capacity_bytes=worker.capacity_bytes)
            for worker in workers
            if not worker.is_leaving
        ]
        base = self._base or self.planned or self.in_force
        self.planned = plan_homes(self.model.layers, live, base, epoch=epoch)
        self.newest_epoch, self._base = epoch, None
        return self.planned

    def publish(self) -> Placement:
        """Bring the plan into force."""
        assert self.planned is not None, "nothing is planned"
        self.in_force, self.planned = self.planned, None
        return self.in_force

    def _has_settled(self, num_live: int, now_s: float) -> bool:
        if self._expected_workers:
            is_patience_over = now_s - self._first_join_s >= self._patience_s
            return num_live >= self._expected_workers or is_patience_over
        return now_s - self._last_join_s >= self._settle_s
