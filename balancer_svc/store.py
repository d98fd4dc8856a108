"""What balancers remember and share: members, placement and its history, loads, who leads, the newest epoch.

Owns the interface and its meaning; redis_store.py has it in Redis. What a leader writes
carries its fencing token: a balancer that led before, and has not noticed that another one does, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from balancer_svc.load_windows import Counts, Window
from balancer_svc.model import Model
from balancer_svc.roster import Member
from collegium.model.placement import NO_PLACEMENT, Placement
from collegium.v1 import balancer_pb2 as pb

NO_TOKEN = 0  # of a balancer that does not lead


class StoreError(Exception):
    """The memory cannot be reached now."""


class FencedError(Exception):
    """Another balancer has come to lead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """All that the memory holds."""

    members: tuple[Member, ...] = ()
    model: Model | None = None
    placement: Placement = NO_PLACEMENT
    planned: Placement | None = None
    newest_epoch: int = 0
    wanted_workers: int = 0
    balance: pb.Balance = field(default_factory=pb.Balance)  # of the balancer that leads
    windows: tuple[Window, ...] = ()  # oldest first
    reports: Mapping[str, Counts] = field(default_factory=dict[str, Counts])  # by router, its newest counts [3, L, E]
    has_lost: bool = False  # a record could not be read and was removed: what we know of it is to be written again


class Store(Protocol):
    """The balancer's memory. Every call raises StoreError within a second or two where it cannot be reached."""

    async def load(self, *, with_windows: bool = True) -> Remembered:
        """Give all that is remembered; the load windows, which are large, only where they are wanted."""
        ...

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone."""
        ...

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        ...

    async def publish(self, placement: Placement, model: Model, token: int = NO_TOKEN) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch. FencedError."""
        ...

    async def save_plan(self, planned: Placement | None, token: int) -> None:
        """Remember what is planned, so that a balancer that comes to lead goes on with it. FencedError."""
        ...

    async def save_model(self, model: Model) -> None:
        """Remember what the workers serve."""
        ...

    async def save_windows(self, windows: Sequence[Window], num_kept: int, *, anew: bool) -> None:
        """Remember more windows of load, oldest first, and no more than so many; `anew`: none of those before."""
        ...

    async def save_balance(self, balance: pb.Balance, token: int) -> None:
        """Remember the account of the balancer that leads, which the others show. FencedError."""
        ...

    async def save_report(self, router_id: str, counts: Counts) -> None:
        """Pass a router's counts on to the balancer that leads."""
        ...

    async def save_wanted(self, num_workers: int) -> None:
        """Remember how many workers there should be."""
        ...

    async def lead(self, balancer_id: str, ttl_s: float) -> int:
        """Take the lead or keep it; gives the fencing token, or NO_TOKEN where another balancer leads."""
        ...

    async def resign(self, balancer_id: str) -> None:
        """Give the lead back, where it is ours."""
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...


def unless_fenced(answer: int) -> int:
    """Give back what a leader's write answered; FencedError where it was refused, which stores say by -1."""
    if answer < 0:
        raise FencedError("another balancer has come to lead")
    return answer
