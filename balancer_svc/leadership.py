"""Whether this balancer leads: the lock in the shared memory, and the fencing token that comes with it.

Owns the token. Every write that only a leader may do carries it, so that a balancer that led before, and has not
noticed that another one does, is refused. What a leader does is in leading.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from balancer_svc.store import NO_TOKEN, Store, StoreError
from collegium.fabric import logs

_log = logs.get("balancer")


class Leadership:
    """Owned by the balancer's event loop."""

    def __init__(self, store: Store, *, ttl_s: float, on_step_down: Callable[[], None]) -> None:
        """ttl_s: how long another balancer waits for this one to come back before it leads. on_step_down: drops what
        only a leader writes.
        """
        self.balancer_id = secrets.token_hex(5)
        self.ttl_s = ttl_s
        self.token = NO_TOKEN
        self._store, self._on_step_down = store, on_step_down
        self._begins_s = 0.0

    @property
    def is_leader(self) -> bool:
        """True if this balancer plans and publishes."""
        return self.token != NO_TOKEN

    def has_begun(self, now_s: float) -> bool:
        """True if this balancer leads and has had the time to hear what the leader before it has done."""
        return self.is_leader and now_s >= self._begins_s

    async def ask(self) -> int:
        """Take or keep the lock. Returns the fencing token, or NO_TOKEN if another balancer leads; sets nothing."""
        return await self._store.lead(self.balancer_id, self.ttl_s)

    def hear(self, token: int, now_s: float, *, why_not: str = "another balancer does") -> None:
        """Take the answer to `ask`: begin to lead, go on, or step down."""
        if token == NO_TOKEN:
            self.step_down(why_not)
        elif not self.is_leader:
            _log.info("leads", token=token)
            self._begins_s = now_s + self.ttl_s
        self.token = token

    def step_down(self, why: str) -> None:
        """Note that another balancer leads, and drop what only a leader writes."""
        if self.is_leader:
            _log.warning("no longer leads", why=why)
        self.token = NO_TOKEN
        self._on_step_down()

    async def resign(self) -> None:
        """Give the lock back, so that another balancer need not wait for it."""
        try:
            await self._store.resign(self.balancer_id)
        except StoreError as error:
            _log.debug("the lead could not be given back", why=str(error))
