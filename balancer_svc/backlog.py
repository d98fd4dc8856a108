"""What the memory has not got yet, and how it is written once it can be reached.

Owns the marks of what is to be written, not the things themselves. What is written is taken before the memory answers:
what comes meanwhile is marked again, and written the next time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from balancer_svc.load_windows import NUM_WINDOWS, Counts, Window
from balancer_svc.planner import Planner
from balancer_svc.roster import Roster
from balancer_svc.store import NO_TOKEN, Store, StoreError

T = TypeVar("T")


@dataclass(slots=True)
class Backlog:
    """Marks; all of them say that something is to be written."""

    members: set[str] = field(default_factory=set[str])  # ids to write, or to forget where nobody has them
    reports: dict[str, Counts] = field(default_factory=dict[str, Counts])  # for the balancer that leads
    wanted: bool = False  # how many workers are wanted
    model: bool = False
    # For a leader to write:
    placement: bool = False  # what is in force
    planned: bool = False  # the plan, or that there is none
    windows: list[Window] = field(default_factory=list[Window])
    are_windows_anew: bool = False  # those that are remembered are of another model, or of a time that is over

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be written."""
        return not (
            self.members
            or self.reports
            or self.wanted
            or self.model
            or self.placement
            or self.planned
            or self.windows
            or self.are_windows_anew
        )

    def mark_all(self, roster: Roster, planner: Planner, windows: Sequence[Window], *, is_leader: bool) -> None:
        """Have everything written again that is ours to write: the memory may have come back empty."""
        self.members.update(member.member_id for member in roster.members() if not member.is_remote)
        if not is_leader:
            return
        self.placement = planner.in_force.epoch > 0
        self.planned = self.are_windows_anew = True
        self.model = planner.model is not None
        self.wanted = planner.wanted_workers > 0
        self.windows = list(windows)

    def drop_leaders(self) -> None:
        """Forget what only a leader writes: another balancer leads."""
        self.placement = self.planned = self.are_windows_anew = False
        self.windows.clear()

    def note_window(self, window: Window) -> None:
        """Mark one more window; while the memory is away, no more than it would keep."""
        self.windows = [*self.windows, window][-NUM_WINDOWS:]

    async def write_members(self, store: Store, roster: Roster) -> None:
        """Write members. Raises StoreError; what was not written is still marked."""
        ids, self.members = self.members, set()
        members = [member for member in map(roster.get, ids) if member is not None]
        try:
            await store.save_members(members, ids.difference(member.member_id for member in members))
        except StoreError:
            self.members |= ids
            raise

    async def write_rest(self, store: Store, planner: Planner, token: int) -> None:
        """Write the rest, as far as the token allows. Raises StoreError and FencedError."""
        if self.model and planner.model is not None:
            self.model = False
            await self._or_mark("model", store.save_model(planner.model))
        if self.placement and planner.model is not None and token != NO_TOKEN:
            self.placement = False
            writing = store.publish(planner.in_force, planner.model, token)
            planner.see_epoch(await self._or_mark("placement", writing))
        if self.planned and token != NO_TOKEN:
            self.planned = False
            await self._or_mark("planned", store.save_plan(planner.planned, token))
        if self.wanted:
            self.wanted = False
            await self._or_mark("wanted", store.save_wanted(planner.wanted_workers))
        if token != NO_TOKEN and (self.windows or self.are_windows_anew):
            windows = list(self.windows)
            await store.save_windows(windows, NUM_WINDOWS, anew=self.are_windows_anew)
            self.are_windows_anew = False
            self.windows = [window for window in self.windows if not any(window is one for one in windows)]
        while self.reports:
            router_id, counts = next(iter(self.reports.items()))
            await store.save_report(router_id, counts)
            if self.reports.get(router_id) is counts:
                del self.reports[router_id]

    async def _or_mark(self, mark: str, writing: Awaitable[T]) -> T:
        try:
            return await writing
        except StoreError:
            setattr(self, mark, True)
            raise
