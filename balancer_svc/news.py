"""What changed and who is told: the watchers by a new view, the memory by its backlog, the loop by a kick.

Owns the view that watchers are given. Knows neither what changes nor how a watcher is reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from balancer_svc.leadership import Leadership
from balancer_svc.memory import Memory
from balancer_svc.messages import to_view
from balancer_svc.state import ClusterState
from collegium.v1 import balancer_pb2 as pb


class News:
    """Owned by the balancer's event loop."""

    def __init__(self, state: ClusterState, leadership: Leadership, memory: Memory) -> None:
        self.kick = asyncio.Event()  # set: the loop looks now rather than at its next tick
        self.is_over = False
        self._state, self._leadership, self._memory = state, leadership, memory
        self._view = to_view(state.roster, state.planner)
        self._has_changed = asyncio.Event()

    def note(self, member_id: str) -> None:
        """Note that a member changed: write it, tell the watchers, and let the loop look at it now."""
        self._memory.backlog.members.add(member_id)
        self.show()
        self.kick.set()

    def show(self) -> None:
        """Tell the watchers how things are now."""
        self._view = self.to_view()
        self._wake()

    def to_view(self) -> pb.WatchPlacementResponse:
        """Write the cluster's view as it is now."""
        balance = self._memory.to_balance()
        leaders = self._memory.leaders_balance
        if not self._leadership.is_leader and leaders is not None:  # a follower knows of the load what the leader says
            balance.CopyFrom(leaders)
            balance.is_leader, balance.has_memory = False, not self._memory.is_lost
        return to_view(self._state.roster, self._state.planner, balance)

    async def views(self) -> AsyncGenerator[pb.WatchPlacementResponse, None]:
        """Yield the view now and whenever it has changed, until `end`; a slow reader misses those in between."""
        last = None
        while not self.is_over:
            has_changed, view = self._has_changed, self._view
            if view is not last:
                last = view
                yield view
            else:
                await has_changed.wait()

    def end(self) -> None:
        """End all watches, and the loop after what it is doing."""
        self.is_over = True
        self._wake()
        self.kick.set()

    def _wake(self) -> None:
        self._has_changed.set()
        self._has_changed = asyncio.Event()
