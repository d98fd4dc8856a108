"""What a balancer knows of its cluster: members, model, placement, load, and what it did about them.

Owns what follows for one of these when another one changes: a model that changes empties the load windows, a member
that leaves takes its samples along. Pure but for the log; neither Redis nor a watcher is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from balancer_svc.balance import Account
from balancer_svc.costs import CostModel
from balancer_svc.load_windows import NUM_WINDOWS, LoadWindows, Window
from balancer_svc.model import Model
from balancer_svc.planner import NO_LOAD, Load, Planner
from balancer_svc.rebalancing import has_even_layers
from balancer_svc.roster import Member, Roster
from balancer_svc.validation import MAX_TOLD_EPOCH
from collegium.v1 import balancer_pb2 as pb


class ClusterState:
    """Owned by the balancer's event loop."""

    def __init__(self, roster: Roster, planner: Planner, *, window_s: float, clock: Callable[[], float]) -> None:
        self.roster = roster
        self.planner = planner
        self.clock = clock
        self.windows = LoadWindows(window_s=window_s, num_kept=NUM_WINDOWS)
        self.costs = CostModel()
        self.account = Account(clock())

    def workers(self) -> list[Member]:
        """List the members that are workers."""
        return self.roster.members(pb.ROLE_WORKER)

    def load(self, workers: Sequence[Member]) -> Load:
        """Return what is known of the load, for a planner that runs in another thread."""
        if not self.windows.windows:
            return NO_LOAD
        costs = self.costs.fit()
        speeds = {worker.member_id: self.costs.speed_of(worker.member_id, costs) for worker in workers}
        return Load(windows=tuple(self.windows.windows), costs=costs, speeds=speeds)

    def forget(self, member: Member) -> None:
        """Drop the samples of a member that left."""
        self.windows.forget(member.member_id)
        self.costs.forget(member.member_id)

    def hear_epoch(self, epoch: int) -> None:
        """Learn of an epoch that a member tells; none raises ours beyond what leaves room to count on."""
        self.planner.see_epoch(min(epoch, MAX_TOLD_EPOCH))

    def is_model_in_use(self) -> bool:
        """Return True if workers live that experts of the known model are placed on."""
        placed = set(self.planner.in_force.worker_ids)
        return self.planner.model is not None and any(worker.member_id in placed for worker in self.workers())

    def adopt_model(self, model: Model) -> bool:
        """Make this the cluster's model. Returns True if it replaces another one, whose load windows are dropped."""
        known = self.planner.model
        is_other = known is not None and known.digest != model.digest
        if is_other:
            self.windows.clear()
        self.planner.adopt_model(model)
        return is_other

    def restore_windows(self, windows: Sequence[Window]) -> None:
        """Take up remembered load windows, as far as they are of this model."""
        model = self.planner.model
        if model is not None and has_even_layers(model.layers):
            self.windows.restore(windows, (len(model.layers), model.layers[0].num_experts))

    def keep_wanted(self) -> list[Member]:
        """Have workers that retire go on if they are wanted again. Returns them."""
        kept = self.planner.to_keep(self.workers())
        for worker in kept:
            worker.state = pb.MEMBER_STATE_SERVING
        return kept

    def measure(self) -> None:
        """Work out how even the newest load window is under the placement in force."""
        self.account.measure(self.planner.model, self.planner.in_force, self.windows.windows)

    def to_balance(self, *, is_leader: bool, has_memory: bool) -> pb.Balance:
        """Write the account of the load and of what was done about it."""
        return self.account.to_message(
            self.clock(),
            retiring=[worker.member_id for worker in self.workers() if worker.state == pb.MEMBER_STATE_RETIRING],
            costs=self.costs.fit(),
            num_windows=len(self.windows.windows),
            is_leader=is_leader,
            has_memory=has_memory,
        )
