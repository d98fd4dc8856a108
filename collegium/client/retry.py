"""When to try again, where, and after how long.

Owns the table of gateway addresses and the rules: another address at once, the same ones after a pause that grows,
never past the caller's deadline, and the server's own RetryInfo before our guess. Pure but for an injected clock and
random source.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from collegium.fabric.addresses import read_address
from collegium.fabric.errors import (
    Cancelled,
    CollegiumError,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

# An address that has failed is asked last for this long.
_SHY_S = 2.0
_CORES_DEADLINE = "Deadline Exceeded"  # gRPC's core says this, among other words, and nothing of what to do


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds of trying again. `rounds` counts tries of all addresses without one new token."""

    rounds: int = 5
    first_pause_s: float = 0.1
    longest_pause_s: float = 3.0
    jitter: float = 0.2  # share of a pause that is random, so that callers do not come back together


class Addresses:
    """Where gateways are; InvalidArgument where that is no HOST:PORT. Safe to share among threads."""

    def __init__(self, target: str | Sequence[str], *, is_encrypted: bool | None = None) -> None:
        """Read the addresses; is_encrypted: whether TLS will be spoken there, None where that is not known."""
        names = [name for entry in _entries(target) for name in entry.split(",") if name.strip()]
        if not names:
            raise InvalidArgument("the target is empty", field="target", remedy="give HOST:PORT, or several")
        self.names = tuple(dict.fromkeys(_read(name, is_encrypted) for name in names))
        self._turn = itertools.count()
        self._failed_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def order(self, now_s: float) -> list[str]:
        """Give the addresses in the order to try them: in turn, those that failed lately last."""
        with self._lock:
            start = next(self._turn) % len(self.names)
            turned = self.names[start:] + self.names[:start]
            return sorted(turned, key=lambda name: now_s - self._failed_s.get(name, -_SHY_S) < _SHY_S)

    def note(self, name: str, *, has_failed: bool, now_s: float) -> None:
        """Remember how an address did."""
        with self._lock:
            if has_failed:
                self._failed_s[name] = now_s
            else:
                self._failed_s.pop(name, None)


class Attempts:
    """The tries of one call."""

    def __init__(
        self, addresses: Addresses, policy: RetryPolicy, *, now_s: float, timeout_s: float | None, rng: random.Random
    ) -> None:
        self._addresses = addresses
        self._policy = policy
        self._rng = rng
        self._deadline_s = None if timeout_s is None else now_s + timeout_s
        self._order = addresses.order(now_s)
        self._position = 0
        self._round = 0

    @property
    def address(self) -> str:
        """Where to try now."""
        return self._order[self._position]

    def time_left_s(self, now_s: float) -> float | None:
        """Give what remains for one try; None without a deadline. DeadlineExceeded where nothing does."""
        if self._deadline_s is None:
            return None
        left_s = self._deadline_s - now_s
        if left_s <= 0:
            raise _out_of_time()
        return left_s

    def succeed(self, now_s: float) -> None:
        """Note progress: the address is good, and counting begins anew."""
        self._round = 0
        self._addresses.note(self.address, has_failed=False, now_s=now_s)

    def fail(self, error: CollegiumError, now_s: float) -> float:
        """Take a failure; gives the pause before the next try, at `address`, or raises the error for good."""
        if isinstance(error, DeadlineExceeded) and _CORES_DEADLINE in error.message:
            raise _out_of_time() from error
        if not is_transient(error):
            raise error
        self._addresses.note(self.address, has_failed=isinstance(error, Unavailable), now_s=now_s)
        self._position += 1
        if self._position < len(self._order):
            return 0.0
        self._position = 0
        self._round += 1
        if self._round >= self._policy.rounds:
            raise error
        pause_s = self._pause_s(error)
        if self._deadline_s is not None and now_s + pause_s >= self._deadline_s:
            raise error
        return pause_s

    def _pause_s(self, error: CollegiumError) -> float:
        policy = self._policy
        ours_s = min(policy.first_pause_s * 2 ** (self._round - 1), policy.longest_pause_s)
        pause_s = max(ours_s, error.retry_after_s or 0.0)
        return pause_s * (1 + policy.jitter * self._rng.random())


def _entries(target: object) -> list[str]:
    entries = [target] if isinstance(target, str) else target
    if isinstance(entries, Iterable) and not isinstance(entries, bytes):
        texts = list(cast("Iterable[object]", entries))
        if all(isinstance(text, str) for text in texts):
            return cast("list[str]", texts)
    raise InvalidArgument(
        f"{target!r} is no address: it is a {type(target).__name__}",
        field="target",
        remedy="give HOST:PORT as a text, or a list of them",
    )


def _read(name: str, is_encrypted: bool | None) -> str:
    try:
        return read_address(name, is_encrypted=is_encrypted)
    except ValueError as error:
        raise InvalidArgument(
            f"{name.strip()[:100]!r} is no address: {error}",
            field="target",
            remedy="give HOST:PORT with a port from 1 to 65535, such as 127.0.0.1:50051",
        ) from None


def _out_of_time() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline has passed", field="timeout_s", remedy="give more time")


def is_transient(error: CollegiumError) -> bool:
    """Say whether the same request may succeed later or elsewhere.

    A stream that the caller did not cancel and that ends CANCELLED was cut by its gateway.
    """
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None  # without it: gRPC's core, such as for a message too large
    return isinstance(error, Unavailable | Cancelled)
