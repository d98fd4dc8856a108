"""A balancer's store in memory, for tests of what needs no Redis; can be told to fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from balancer_svc.load_windows import Counts, Window
from balancer_svc.messages import from_message, to_message
from balancer_svc.model import Model
from balancer_svc.roster import Member
from balancer_svc.store import NO_TOKEN, Remembered, StoreError, unless_fenced
from collegium.model.placement import NO_PLACEMENT, Placement
from collegium.v1 import balancer_pb2 as pb


@dataclass(slots=True, kw_only=True)
class MemoryStore:
    """A Store in memory, for tests; can be told to fail."""

    members: dict[str, bytes] = field(default_factory=dict[str, bytes])
    placement: Placement = NO_PLACEMENT
    model: Model | None = None
    planned: Placement | None = None
    epoch: int = 0
    is_away: bool = False
    wanted_workers: int = 0
    windows: list[Window] = field(default_factory=list[Window])
    reports: dict[str, Counts] = field(default_factory=dict[str, Counts])
    balance: pb.Balance = field(default_factory=pb.Balance)
    leader: str = ""
    token: int = NO_TOKEN

    async def load(self, *, with_windows: bool = True) -> Remembered:
        """Give all that is remembered."""
        self._reach()
        members = tuple(from_message(pb.Member.FromString(value)) for _, value in sorted(self.members.items()))
        newest = max(self.epoch, self.placement.epoch)
        return Remembered(
            members=members,
            model=self.model,
            placement=self.placement,
            planned=self.planned,
            newest_epoch=newest,
            wanted_workers=self.wanted_workers,
            balance=self.balance,
            windows=tuple(self.windows),
            reports=dict(self.reports),
        )

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone."""
        self._reach()
        self.members |= {member.member_id: to_message(member).SerializeToString() for member in members}
        for member_id in gone:
            self.members.pop(member_id, None)

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        self._reach()
        self.epoch = max(self.epoch, floor) + 1
        return self.epoch

    async def publish(self, placement: Placement, model: Model, token: int = NO_TOKEN) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch. FencedError."""
        self._reach()
        unless_fenced(-1 if token < self.token else 0)
        if placement.epoch > self.placement.epoch:
            self.placement, self.model, self.planned = placement, model, None
        return self.placement.epoch

    async def save_plan(self, planned: Placement | None, token: int) -> None:
        """Remember what is planned. FencedError."""
        self._reach()
        unless_fenced(-1 if token < self.token else 0)
        self.planned = planned

    async def save_model(self, model: Model) -> None:
        """Remember what the workers serve."""
        self._reach()
        self.model = model

    async def save_windows(self, windows: Sequence[Window], num_kept: int, *, anew: bool) -> None:
        """Remember more windows of load, oldest first, and no more than so many; `anew`: none of those before."""
        self._reach()
        self.windows = [*([] if anew else self.windows), *windows][-num_kept:]

    async def save_balance(self, balance: pb.Balance, token: int) -> None:
        """Remember the account of the balancer that leads. FencedError."""
        self._reach()
        unless_fenced(-1 if token < self.token else 0)
        self.balance = balance

    async def save_report(self, router_id: str, counts: Counts) -> None:
        """Pass a router's counts on to the balancer that leads."""
        self._reach()
        self.reports[router_id] = counts

    async def save_wanted(self, num_workers: int) -> None:
        """Remember how many workers there should be."""
        self._reach()
        self.wanted_workers = num_workers

    async def lead(self, balancer_id: str, ttl_s: float) -> int:
        """Take the lead or keep it for good; gives the fencing token, or NO_TOKEN where another balancer leads."""
        self._reach()
        if self.leader not in ("", balancer_id):
            return NO_TOKEN
        self.token += not self.leader
        self.leader = balancer_id
        return self.token

    async def resign(self, balancer_id: str) -> None:
        """Give the lead back, where it is ours."""
        self._reach()
        self.leader = "" if self.leader == balancer_id else self.leader

    async def close(self) -> None:
        """Give nothing back: there is nothing."""

    def _reach(self) -> None:
        if self.is_away:
            raise StoreError("told to be away")
