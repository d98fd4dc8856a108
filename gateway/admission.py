"""Decide which requests come in: bounded in requests and in prompt tokens that wait for their first answer.

Owns the two counts and the estimate of when to come back. Pure but for an injected clock; the event loop's thread
owns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from collegium.fabric.errors import ResourceExhausted

_MIN_RETRY_S = 0.2
_MAX_RETRY_S = 30.0
# Weight of the newest measurement in the running mean of how long a request and a queued token take.
_SMOOTHING = 0.2
_FIRST_GUESS_S = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One admitted request's share. Its prompt counts as queued until its first token."""

    num_tokens: int
    admitted_s: float
    is_queued: bool = True
    is_open: bool = True


class Admission:
    """Counts what is inside."""

    __slots__ = (
        "_clock",
        "_max_queued_tokens",
        "_max_requests",
        "_queue_s",
        "_request_s",
        "num_requests",
        "queued_tokens",
    )

    def __init__(self, *, max_requests: int, max_queued_tokens: int, clock: Callable[[], float]) -> None:
        self._max_requests = max_requests
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock
        self._request_s = _FIRST_GUESS_S  # mean time of a request inside
        self._queue_s = _FIRST_GUESS_S  # mean time until a first token
        self.num_requests = 0
        self.queued_tokens = 0

    def admit(self, num_tokens: int) -> Ticket:
        """Let a request with a prompt of num_tokens in, or raise ResourceExhausted with when to come back.

        A prompt larger than the whole bound is let in when nothing else waits.
        """
        if self.num_requests >= self._max_requests:
            raise self._refusal(
                f"all {self._max_requests} places are taken", "REQUESTS_EXHAUSTED", self._request_s / self._max_requests
            )
        if self.queued_tokens and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise self._refusal(
                f"{self.queued_tokens} prompt tokens wait already, and the bound is {self._max_queued_tokens}",
                "TOKENS_EXHAUSTED",
                self._queue_s,
            )
        self.num_requests += 1
        self.queued_tokens += num_tokens
        return Ticket(num_tokens=num_tokens, admitted_s=self._clock())

    def start(self, ticket: Ticket) -> None:
        """Note a request's first token: its prompt waits no more. Idempotent."""
        if ticket.is_queued and ticket.is_open:
            ticket.is_queued = False
            self.queued_tokens -= ticket.num_tokens
            self._queue_s += _SMOOTHING * (self._clock() - ticket.admitted_s - self._queue_s)

    def release(self, ticket: Ticket) -> None:
        """Give a place back. Idempotent."""
        if not ticket.is_open:
            return
        ticket.is_open = False
        self.num_requests -= 1
        if ticket.is_queued:
            self.queued_tokens -= ticket.num_tokens
        else:
            self._request_s += _SMOOTHING * (self._clock() - ticket.admitted_s - self._request_s)

    def _refusal(self, message: str, reason: str, retry_after_s: float) -> ResourceExhausted:
        delay_s = min(max(retry_after_s, _MIN_RETRY_S), _MAX_RETRY_S)
        return ResourceExhausted(
            f"the gateway is full: {message}",
            reason=reason,
            remedy=f"try again in {delay_s:.1f} s, or at another gateway",
            retry_after_s=delay_s,
        )
