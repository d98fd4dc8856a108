"""Carry one admitted request to its last chunk, over as many routers as it takes.

Owns the order of things: choose a router, deliver what comes, replay when the router is lost, give everything back.
Knows no proto service; the caller gives a function that writes a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpc import aio

from collegium.fabric import logs, metrics, tracing
from collegium.fabric.errors import Cancelled, CollegiumError, DeadlineExceeded, Unavailable
from collegium.v1 import inference_pb2 as pb
from gateway.attachment import HANDED_OVER, Attachment, Seat, Sitter
from gateway.counts import Counts
from gateway.generation import Generation
from gateway.pool import RouterPool
from gateway.scoring import Scoring

# A request whose routers are lost this often without one new token is taken to be what ends them.
MAX_FRUITLESS_REPLAYS = 5
_log = logs.get("gateway")
Write = Callable[[pb.GenerateResponse], Awaitable[None]]


class Work(Sitter, Protocol):
    """What a Generation and a Scoring have in common."""

    changed: asyncio.Event
    error: CollegiumError | None
    lost: CollegiumError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """When a request came and by when it must be answered (None: no limit), on the loop's clock; and who asks."""

    arrived_s: float
    deadline_s: float | None
    caller: int = 0  # as routers are told; 0: not known

    def left_ms(self, now_s: float) -> int:
        """Give what remains, as routers are told: at least 1; 0 says that there is no limit."""
        return 0 if self.deadline_s is None else max(1, round((self.deadline_s - now_s) * 1e3))


class Relay:
    """Runs requests; owned by the event loop's thread."""

    def __init__(
        self,
        pool: RouterPool,
        counts: Counts,
        *,
        router_wait_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._pool = pool
        self._counts = counts
        self._router_wait_s = router_wait_s
        self._stall_timeout_s = stall_timeout_s

    async def generate(
        self, generation: Generation, write: Write, arrival: Arrival, on_first_token: Callable[[], None]
    ) -> None:
        """Serve a generation to its end. Raises what the caller should be told."""
        delivery = _Delivery(generation, write, arrival, self._counts, self._stall_timeout_s, on_first_token)
        if generation.is_finished:  # a resumed stream that had only its end left
            await delivery.step()
            return
        try:
            async with asyncio.timeout_at(arrival.deadline_s):
                accepted = generation.accepted
                await self._over_routers(generation, accepted.request_id, accepted.prompt_ids, delivery, arrival)
        except TimeoutError:
            raise _too_late() from None
        finally:
            delivery.count()

    async def tell(self, write: Callable[[Any], Awaitable[None]], message: object) -> None:
        """Write a message of a stream that cannot be resumed. Raises as write_in_time does."""
        remedy = "read the stream, or send again what is not answered"
        await write_in_time(write, message, self._stall_timeout_s, remedy)

    async def score(self, scoring: Scoring, token_ids: Sequence[int], arrival: Arrival) -> pb.ScoreResponse:
        """Serve a scoring to its end."""
        if not scoring.is_finished:
            try:
                async with asyncio.timeout_at(arrival.deadline_s):
                    await self._over_routers(scoring, "score", token_ids, _Waiting(scoring), arrival)
            except TimeoutError:
                raise _too_late() from None
        return scoring.result()

    async def _over_routers(
        self, work: Work, request_id: str, prompt_ids: Sequence[int], end: _Delivery | _Waiting, arrival: Arrival
    ) -> None:
        avoid: Attachment | None = None
        num_fruitless = 0
        while True:
            router = await self._router_for(work, prompt_ids, avoid)
            if router is None:
                work.changed.clear()
                if await end.step():
                    return
                continue
            progress = end.progress
            deadline_ms = arrival.left_ms(asyncio.get_running_loop().time())
            traceparent = tracing.current_traceparent()
            seat = router.seat(
                work, request_id, deadline_ms=deadline_ms, traceparent=traceparent, caller=arrival.caller
            )
            if await _sit_out(work, seat, end):
                return
            avoid = router
            if work.lost is not None and work.lost.reason == HANDED_OVER and end.progress == progress:
                _log.info("handed over", by=router.address)
                continue
            num_fruitless = 0 if end.progress > progress else num_fruitless + 1
            if num_fruitless > MAX_FRUITLESS_REPLAYS:
                why = "" if work.lost is None else work.lost.message
                raise Unavailable(
                    f"{num_fruitless} routers were lost on this request; the last: {why}", reason="REPLAY_LIMIT"
                )
            self._counts.replays += 1
            _log.info("replaying", lost=router.address, progress=end.progress)

    async def _router_for(self, work: Work, prompt_ids: Sequence[int], avoid: Attachment | None) -> Attachment | None:
        """Wait for a router; None where the request changed meanwhile, because its caller has cancelled it."""
        if self._pool.can_serve:
            return await self._pool.pick(prompt_ids, wait_s=0, avoid=avoid)
        picking = asyncio.ensure_future(self._pool.pick(prompt_ids, wait_s=self._router_wait_s, avoid=avoid))
        changing = asyncio.ensure_future(work.changed.wait())
        try:
            await asyncio.wait((picking, changing), return_when=asyncio.FIRST_COMPLETED)
            return picking.result() if picking.done() else None
        finally:
            picking.cancel()
            changing.cancel()


async def write_in_time(
    write: Callable[[Any], Awaitable[None]], message: object, stall_timeout_s: float, remedy: str
) -> None:
    """Write a message of a stream. Raises Cancelled where the caller does not read, CancelledError where it is gone."""
    try:
        async with asyncio.timeout(stall_timeout_s):
            await write(message)
    except aio.InternalError:  # the call is over at the other end; this task's own cancellation is under way
        raise asyncio.CancelledError("the caller went away") from None
    except TimeoutError:
        raise Cancelled(
            f"the caller has not read for {stall_timeout_s:g} s", reason="CALLER_STALLED", remedy=remedy
        ) from None


class _Delivery:
    """The caller's side of a generation."""

    def __init__(
        self,
        generation: Generation,
        write: Write,
        arrival: Arrival,
        counts: Counts,
        stall_timeout_s: float,
        on_first_token: Callable[[], None],
    ) -> None:
        self._on_first_token = on_first_token
        self._generation = generation
        self._write = write
        self._counts = counts
        self._num_counted = 0
        self._stall_timeout_s = stall_timeout_s
        self._arrived_s = self._last_s = arrival.arrived_s
        self._num_tokens = 0

    @property
    def progress(self) -> int:
        return self._generation.num_new_tokens

    async def step(self) -> bool:
        """Deliver what there is; True once the caller has been given the last message."""
        while (response := self._generation.take()) is not None:
            await self._deliver(response)
            if not self._generation.has_rest:
                break
        return self._generation.is_delivered

    async def _deliver(self, response: pb.GenerateResponse) -> None:
        self.count()
        self._measure(sum(len(chunk.token_ids) for chunk in response.chunks))
        remedy = "read the stream, or Resume from what was received"
        await write_in_time(self._write, response, self._stall_timeout_s, remedy)

    def count(self) -> None:
        """Count the tokens that have come since the last time."""
        now = self._generation.num_new_tokens
        self._counts.generation_tokens += now - self._num_counted
        self._num_counted = now

    def _measure(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now_s = asyncio.get_running_loop().time()
        if self._num_tokens == 0:
            self._on_first_token()
            self._generation.first_token_s = now_s
            metrics.histogram("collegium_time_to_first_token_seconds").observe(now_s - self._arrived_s)
        else:
            metrics.histogram("collegium_inter_token_latency_seconds").observe((now_s - self._last_s) / num_tokens)
        self._num_tokens += num_tokens
        self._last_s = now_s


class _Waiting:
    """The caller's side of a scoring: nothing is delivered before the end."""

    progress = 0

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring

    async def step(self) -> bool:
        return self._scoring.is_finished


async def _sit_out(work: Work, seat: Seat, end: _Delivery | _Waiting) -> bool:
    """Stay on one router until the request is done (True) or the router is lost (False)."""
    try:
        while True:
            await work.changed.wait()
            work.changed.clear()
            if work.error is not None:
                raise _taken_from(work)
            if await end.step():
                return True
            if work.lost is not None:
                return False
    finally:
        seat.leave()
        work.stand_up()


def _taken_from(work: Work) -> CollegiumError:
    # Kept by the request or by a frame that it passes, an error would keep both by way of its traceback.
    error, work.error = work.error, None
    assert error is not None
    return error


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the caller's deadline has passed", remedy="give more time, or ask for fewer tokens")
