"""The one stream between this gateway and one router, and the requests that sit on it.

Owns the connection: it comes up, breaks and comes up again here. The stream is always drained; what a request does
with its news is the request's business. When the stream breaks, every request on it is told, and places itself anew.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.fabric import logs
from collegium.fabric.errors import CollegiumError, FailedPrecondition, Internal, Unavailable, from_rpc_error
from collegium.fabric.faults import Faults
from collegium.v1 import inference_pb2, router_pb2_grpc
from collegium.v1 import router_pb2 as pb
from gateway.choose import Candidate
from gateway.outbox import Outbox

_DESCRIBE_S = 5.0
_BACKOFF_S = (0.1, 2.0)
HANDED_OVER = "DRAINING"  # the reason of a failure by which a router sends back what it has not begun
OTHER_MODEL = "OTHER_MODEL"  # the reason for which a router that runs is not used
_SERVING = health_pb2.HealthCheckResponse.SERVING
_log = logs.get("gateway.routers")
Stream = aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]


class Sitter(Protocol):
    """A request that sits on a router's stream."""

    def submission(self, submission_id: str, *, deadline_ms: int, traceparent: str) -> pb.Submission:
        """Write down what the router has to do."""
        ...

    def sit(self, seat: Seat) -> None:
        """Note where it sits."""
        ...

    def stand_up(self) -> None:
        """Forget where it sat."""
        ...

    def take_news(self, news: pb.SequenceNews) -> None:
        """Take the news of one choice."""
        ...

    def fail(self, error: CollegiumError) -> None:
        """End by an error."""
        ...

    def lose_router(self, why: CollegiumError) -> None:
        """Learn that no more news will come."""
        ...


class Seat:
    """One request's place on a stream. Every method is without effect once the seat is gone."""

    __slots__ = ("_attachment", "has_news", "num_prompt_tokens", "open_choices", "sitter", "submission_id")

    def __init__(self, attachment: Attachment, submission: pb.Submission, sitter: Sitter) -> None:
        self._attachment = attachment
        self.sitter = sitter
        self.submission_id = submission.request_id
        self.num_prompt_tokens = len(submission.prompt_ids)
        self.open_choices = {choice.choice_index for choice in submission.choices}
        self.has_news = False

    def cancel(self, choice_index: int) -> None:
        """End one choice at the router."""
        self._attachment.cancel(self, choice_index)

    def leave(self) -> None:
        """Give the place back and end what the router still grows. Idempotent."""
        self._attachment.cancel(self, None)

    def pause(self) -> None:
        """Hold all choices at the router."""
        self._attachment.pause(self, is_paused=True)

    def unpause(self) -> None:
        """Let them go on."""
        self._attachment.pause(self, is_paused=False)


class Attachment:
    """One router, by address. `run` keeps the stream up until it is cancelled; the event loop's thread owns it."""

    def __init__(
        self,
        address: str,
        *,
        gateway_id: str,
        connect: Callable[[str], aio.Channel],
        why_not: Callable[[inference_pb2.Model], str],
        on_change: Callable[[Attachment], None],
    ) -> None:
        """`why_not` says why a model that a router describes cannot be served here; "" if it can."""
        self.address = address
        self.router_id = ""
        self.model: inference_pb2.Model | None = None
        self.load = pb.RouterLoad()
        self.is_attached = False
        self.last_words = ""  # why it could not be attached, since it last was
        self._gateway_id = gateway_id
        self._connect = connect
        self._why_not = why_not
        self._on_change = on_change
        self._is_healthy = False
        self._outbox = Outbox()
        self._has_mail = asyncio.Event()
        self._seats: dict[str, Seat] = {}
        self._serial = itertools.count()
        self._faults = Faults(_log, f"the stream to router {address}")
        self._num_sequences = 0
        self._unstarted_tokens = 0

    @property
    def can_serve(self) -> bool:
        """Whether a request may be placed here."""
        return self.is_attached and self._is_healthy

    def candidate(self) -> Candidate:
        """Show the load: what the router said last, or what we ourselves have put there since."""
        return Candidate(
            address=self.address,
            num_sequences=max(self._num_sequences, self.load.num_running + self.load.num_waiting),
            waiting_tokens=max(self._unstarted_tokens, self.load.waiting_tokens),
        )

    def seat(self, sitter: Sitter, request_id: str, *, deadline_ms: int, traceparent: str, caller: int = 0) -> Seat:
        """Hand a request to the router, under an id that no other stream and no earlier attempt has used."""
        submission_id = f"{request_id}/{self._gateway_id}.{next(self._serial)}"
        submission = sitter.submission(submission_id, deadline_ms=deadline_ms, traceparent=traceparent)
        submission.caller = caller
        seat = Seat(self, submission, sitter)
        self._seats[submission_id] = seat
        self._num_sequences += len(seat.open_choices)
        self._unstarted_tokens += seat.num_prompt_tokens
        self._outbox.submit(submission)
        self._has_mail.set()
        sitter.sit(seat)
        return seat

    def cancel(self, seat: Seat, choice_index: int | None) -> None:
        """End a request at the router, or one choice of it."""
        if seat.submission_id not in self._seats:
            return
        if choice_index is not None and seat.open_choices - {choice_index}:
            self._close_choice(seat, choice_index)
            self._outbox.cancel(seat.submission_id, choice_index)
        else:
            self._drop(seat)
            self._outbox.cancel(seat.submission_id)
        self._has_mail.set()

    def pause(self, seat: Seat, *, is_paused: bool) -> None:
        """Hold a request at the router, or let it go on."""
        if seat.submission_id in self._seats:
            if is_paused:
                self._outbox.pause(seat.submission_id)
            else:
                self._outbox.unpause(seat.submission_id)
            self._has_mail.set()

    async def run(self) -> None:
        """Keep the stream up, for ever, with growing pauses between attempts that failed."""
        pause_s = _BACKOFF_S[0]
        while True:
            is_refused = False
            try:
                await self._attend()
                words = "the router ended the stream"
            except CollegiumError as error:
                words, is_refused = error.message, error.reason == OTHER_MODEL
            except aio.AioRpcError as error:
                words = from_rpc_error(error).message
            except TimeoutError:
                words = f"it sent no first frame within {_DESCRIBE_S:g} s"
            except Exception as error:  # of what it sent, or of ours: its requests go to another router
                self._faults.note(error)
                words = "its stream could not be read"
            if self._end(Unavailable(f"router {self.address}: {words}", reason="ROUTER_LOST")):
                pause_s, self.last_words = _BACKOFF_S[0], ""
            if words != self.last_words:
                say = _log.warning if is_refused else _log.info
                say("router not attached", address=self.address, why=words)
                self.last_words = words
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _BACKOFF_S[1])

    async def _attend(self) -> None:
        async with self._connect(self.address) as channel:
            stub: Any = router_pb2_grpc.RouterStub(channel)
            described: pb.DescribeResponse = await stub.Describe(pb.DescribeRequest(), timeout=_DESCRIBE_S)
            stream: Stream = stub.Attach()
            try:
                await self._converse(described, stream, channel)
            finally:
                stream.cancel()

    async def _converse(self, described: pb.DescribeResponse, stream: Stream, channel: aio.Channel) -> None:
        await stream.write(pb.AttachRequest(gateway_id=self._gateway_id))
        async with asyncio.timeout(_DESCRIBE_S):
            first = await stream.read()
        if not isinstance(first, pb.AttachResponse):
            await _raise_status(stream)
            return
        if why := self._why_not(described.model):
            raise FailedPrecondition(f"it runs another model: {why}", reason=OTHER_MODEL)
        self.router_id, self.model = described.router_id, described.model
        self.load.CopyFrom(first.load)
        self.is_attached = True
        _log.info("router attached", address=self.address, router_id=self.router_id, model=self.model.name)
        others = [asyncio.create_task(self._write(stream)), asyncio.create_task(self._watch_health(channel))]
        try:
            await self._read(stream)
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _read(self, stream: Stream) -> None:
        while True:
            frame = await stream.read()
            if not isinstance(frame, pb.AttachResponse):
                await _raise_status(stream)
                return
            if frame.HasField("load"):
                self.load.CopyFrom(frame.load)
            for news in frame.news:
                self._take_news(news)

    def _take_news(self, news: pb.SequenceNews) -> None:
        seat = self._seats.get(news.request_id)
        if seat is None or news.choice_index not in seat.open_choices:
            return  # what was under way when it was cancelled
        if not seat.has_news:
            seat.has_news = True
            self._unstarted_tokens -= seat.num_prompt_tokens
        if news.finish_reason or news.HasField("failure"):
            self._close_choice(seat, news.choice_index)
            if not seat.open_choices:
                self._drop(seat)
                self._outbox.close(seat.submission_id)
        if news.failure.reason == HANDED_OVER and self._is_healthy:
            self._set_healthy(False)  # its health says so too, but maybe later
        try:
            seat.sitter.take_news(news)
        except CollegiumError as error:
            seat.sitter.fail(error.with_traceback(None))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:  # a panic of the tokenizers library is no Exception
            # What one request's text brings about must not end the stream that all others are on.
            _log.exception("news could not be taken", submission=seat.submission_id)
            seat.sitter.fail(Internal("the gateway failed on this request's news; its log has the details"))

    async def _write(self, stream: Stream) -> None:
        # A broken stream ends the reader, which ends this task.
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while (frame := self._outbox.next_frame()) is not None:
                await stream.write(frame)

    async def _watch_health(self, channel: aio.Channel) -> None:
        """Follow what the router says of itself; one without a health service counts as healthy."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                async for response in stub.Watch(health_pb2.HealthCheckRequest()):
                    self._set_healthy(response.status == _SERVING)
            except aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    self._set_healthy(True)
                    return
            await asyncio.sleep(_BACKOFF_S[0])

    def _set_healthy(self, is_healthy: bool) -> None:
        self._is_healthy = is_healthy
        self._on_change(self)

    def _end(self, why: Unavailable) -> bool:
        was_attached, self.is_attached = self.is_attached, False
        self._is_healthy = False
        self._outbox = Outbox()
        seats, self._seats = list(self._seats.values()), {}
        self._num_sequences = self._unstarted_tokens = 0
        self._on_change(self)
        for seat in seats:
            seat.sitter.lose_router(why)
        return was_attached

    def _close_choice(self, seat: Seat, choice_index: int) -> None:
        if choice_index in seat.open_choices:
            seat.open_choices.discard(choice_index)
            self._num_sequences -= 1

    def _drop(self, seat: Seat) -> None:
        del self._seats[seat.submission_id]
        self._num_sequences -= len(seat.open_choices)
        seat.open_choices.clear()
        if not seat.has_news:
            seat.has_news = True
            self._unstarted_tokens -= seat.num_prompt_tokens


async def _raise_status(stream: Stream) -> None:
    code = await stream.code()
    if code != grpc.StatusCode.OK:
        raise Unavailable(await stream.details() or code.name, reason="ROUTER_LOST")
