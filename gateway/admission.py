"""Decide which requests come in: bounded in requests, sequences, tokens to be made, and prompt tokens that wait.

Owns the counts and the estimate of when to come back. A request takes its place before anything costly is done for it.
Pure but for an injected clock; the event loop's thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from collegium.fabric.errors import ResourceExhausted

_MIN_RETRY_S = 0.2
_MAX_RETRY_S = 30.0
# Weight of the newest measurement in the running mean of how long a request and a queued token take.
_SMOOTHING = 0.2
_FIRST_GUESS_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be inside at once."""

    requests: int
    sequences: int  # choices, of requests that ask for more than one
    output_tokens: int  # that all of them may still grow to
    queued_tokens: int  # of prompts, and of answers that are resumed, that wait for their first token


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One admitted request's share. Its prompt counts as queued from when its length is known to its first token."""

    num_sequences: int
    num_output_tokens: int
    admitted_s: float
    num_tokens: int = 0
    is_queued: bool = False
    has_started: bool = False


class Admission:
    """Counts what is inside."""

    __slots__ = (
        "_clock",
        "_limits",
        "_on_refusal",
        "_queue_s",
        "_request_s",
        "num_requests",
        "num_sequences",
        "output_tokens",
        "queued_tokens",
    )

    def __init__(
        self, limits: Limits, *, clock: Callable[[], float], on_refusal: Callable[[], None] = lambda: None
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._on_refusal = on_refusal
        self._request_s = _FIRST_GUESS_S  # mean time of a request inside
        self._queue_s = _FIRST_GUESS_S  # mean time until a first token
        self.num_requests = 0
        self.num_sequences = 0
        self.output_tokens = 0
        self.queued_tokens = 0

    @contextmanager
    def admitted(self, *, num_sequences: int = 1, num_output_tokens: int = 0) -> Iterator[Ticket]:
        """Let a request in for the time of a with block, or raise ResourceExhausted with when to come back.

        A request for one sequence is bounded by the number of requests alone, so that those who ask for many leave
        room for it. One that is larger than a whole bound is let in if nothing of its kind is inside.
        """
        ticket = self._admit(num_sequences, num_output_tokens)
        try:
            yield ticket
        finally:
            self._release(ticket)

    def queue(self, ticket: Ticket, num_tokens: int) -> None:
        """Note how many tokens a request brings; ResourceExhausted if too many wait already."""
        waiting, limit = self.queued_tokens, self._limits.queued_tokens
        if waiting and waiting + num_tokens > limit:
            raise self._refusal(
                f"{waiting} prompt tokens wait already, and the limit is {limit}", "TOKENS_EXHAUSTED", self._queue_s
            )
        ticket.num_tokens, ticket.is_queued = num_tokens, True
        self.queued_tokens += num_tokens

    def start(self, ticket: Ticket) -> None:
        """Note a request's first token: its prompt waits no more. Idempotent."""
        if ticket.is_queued:
            ticket.is_queued, ticket.has_started = False, True
            self.queued_tokens -= ticket.num_tokens
            self._queue_s += _SMOOTHING * (self._clock() - ticket.admitted_s - self._queue_s)

    def _admit(self, num_sequences: int, num_output_tokens: int) -> Ticket:
        limits, share_s = self._limits, self._request_s / self._limits.requests
        if self.num_requests >= limits.requests:
            raise self._refusal(f"all {limits.requests} places are taken", "REQUESTS_EXHAUSTED", share_s)
        for what, reason, inside, more, limit in (
            ("sequences", "SEQUENCES_EXHAUSTED", self.num_sequences, num_sequences, limits.sequences),
            ("output tokens", "OUTPUT_EXHAUSTED", self.output_tokens, num_output_tokens, limits.output_tokens),
        ):
            if num_sequences > 1 and inside and inside + more > limit:
                message = f"{inside} {what} are promised already, and {more} more would exceed the limit of {limit}"
                raise self._refusal(message, reason, self._request_s)
        self.num_requests += 1
        self.num_sequences += num_sequences
        self.output_tokens += num_output_tokens
        return Ticket(num_sequences=num_sequences, num_output_tokens=num_output_tokens, admitted_s=self._clock())

    def _release(self, ticket: Ticket) -> None:
        self.num_requests -= 1
        self.num_sequences -= ticket.num_sequences
        self.output_tokens -= ticket.num_output_tokens
        if ticket.is_queued:
            self.queued_tokens -= ticket.num_tokens
            ticket.is_queued = False
        elif ticket.has_started:
            self._request_s += _SMOOTHING * (self._clock() - ticket.admitted_s - self._request_s)

    def _refusal(self, message: str, reason: str, retry_after_s: float) -> ResourceExhausted:
        self._on_refusal()
        delay_s = min(max(retry_after_s, _MIN_RETRY_S), _MAX_RETRY_S)
        return ResourceExhausted(
            f"the gateway is full: {message}",
            reason=reason,
            remedy=f"try again in {delay_s:.1f} s, or at another gateway",
            retry_after_s=delay_s,
        )
