"""The router's gRPC service: describe the model, attach gateways, let callers trace.

Owns one outbox per attached gateway: the engine's thread fills it, the event loop drains it. A gateway that stops
reading is cut off when its outbox is full, in frames or in bytes; gateways always drain their streams. A trace has such
an outbox as well. Streams and traces are counted, and those beyond a limit refused.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import grpc

from collegium.fabric import logs
from collegium.fabric.errors import CollegiumError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc
from router_svc.choices import Listeners, StepChoices
from router_svc.commands import Commands, Ref
from router_svc.messages import (
    FRAME_NEWS,
    frame_between,
    frame_of,
    hand_over,
    refusal,
    sequences_of,
    trace_header,
    trace_messages,
)
from router_svc.news import Load, News
from router_svc.submissions import MAX_REQUEST_ID_CHARS, can_name, check_frame

_log = logs.get("router")
_OUTBOX_FRAMES = 4096  # at one frame a step: minutes of a gateway that does not read
_OUTBOX_BYTES = 64 << 20  # of frames that wait: whichever bound is reached first
_TRACED_STEPS = 256  # that may wait for a caller of Trace
_TRACED_CHOICES = 4_000_000  # of experts, in the steps that may wait: some 50 MB
_MAX_COMMANDS = 1000  # that may wait for the engine before more frames are read

Frame = router_pb2.AttachResponse
Context = grpc.aio.ServicerContext


@dataclass(slots=True)
class _Attached:
    outbox: asyncio.Queue[Frame | None]
    gateway_id: str = ""
    is_cut: bool = False
    num_bytes: int = 0  # of the frames in the outbox
    error: CollegiumError | None = None  # with which the stream ends


class Outboxes:
    """Where the engine's news go, by owner. `deliver` is for the engine's thread, the rest for the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.on_cut: Callable[[int], None] = lambda owner: None  # told of an owner whose gateway does not read
        self._attached: dict[int, _Attached] = {}
        self._ids = itertools.count(1)

    def open(self) -> tuple[int, _Attached]:
        """Make an outbox for a new stream."""
        owner = next(self._ids)
        self._attached[owner] = _Attached(asyncio.Queue(_OUTBOX_FRAMES))
        return owner, self._attached[owner]

    def __len__(self) -> int:
        return len(self._attached)

    def is_cut(self, owner: int) -> bool:
        """True if an owner's stream ends because it is not read."""
        attached = self._attached.get(owner)
        return attached is None or attached.is_cut

    def close(self, owner: int) -> None:
        """Forget an owner."""
        self._attached.pop(owner, None)

    def deliver(self, owner: int, news: list[News], load: Load, step: int) -> None:
        """Queue a frame. Thread-safe."""
        self._loop.call_soon_threadsafe(self.put, owner, frame_of(news, load, step))

    def put(self, owner: int, frame: Frame | None) -> None:
        """Queue a frame; None ends the stream."""
        attached = self._attached.get(owner)
        if attached is None or attached.is_cut:
            return
        outbox, num_bytes = attached.outbox, 0 if frame is None else frame.ByteSize()
        if not outbox.full() and (outbox.empty() or attached.num_bytes + num_bytes <= _OUTBOX_BYTES):
            attached.num_bytes += num_bytes
            outbox.put_nowait(frame)
            return
        attached.is_cut = True
        while not outbox.empty():  # nobody will read it
            outbox.get_nowait()
        outbox.put_nowait(None)
        self.on_cut(owner)
        _log.warning("gateway does not read its stream and is cut off", gateway_id=attached.gateway_id)

    def end_all(self) -> None:
        """End every stream."""
        for owner in list(self._attached):
            self.put(owner, None)


class RouterService(router_pb2_grpc.RouterServicer):
    """Implements collegium.v1.Router."""

    def __init__(self, outboxes: Outboxes, *, max_gateways: int = 1024, max_traces: int = 16):
        """`max_gateways`, `max_traces`: streams of either kind at once; more are refused."""
        self._outboxes, self._max_gateways, self._max_traces = outboxes, max_gateways, max_traces
        self._commands: Commands | None = None  # to the engine; None until the model is loaded
        self._listeners = Listeners()
        self._model = inference_pb2.Model()
        self._expert_bytes: Seq[int] = ()
        self._traces: set[asyncio.Queue[StepChoices | CollegiumError]] = set()
        self.router_id = ""
        self.is_draining = False

    def open(
        self, commands: Commands, listeners: Listeners, model: inference_pb2.Model, expert_bytes: Seq[int]
    ) -> None:
        """Begin to serve a loaded model by an engine's commands and listeners; `expert_bytes`: of one expert, by MoE
        layer.
        """
        self._commands, self._listeners = commands, listeners
        self._model, self._expert_bytes = model, expert_bytes
        self._outboxes.on_cut = commands.detach

    def end_traces(self) -> None:
        """End every trace."""
        for steps in self._traces:
            if not steps.full():  # then its end stands in it already
                steps.put_nowait(_draining())

    async def Describe(self, request: router_pb2.DescribeRequest, context: Context) -> router_pb2.DescribeResponse:
        """Say which model this router runs."""
        self._ready()
        return router_pb2.DescribeResponse(router_id=self.router_id, model=self._model)

    async def Attach(
        self, request_iterator: AsyncIterator[router_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[Frame]:
        """Serve one gateway until its stream ends; its sequences end with it."""
        commands = self._ready()
        self._check_room(commands, "gateways", len(self._outboxes), self._max_gateways)
        owner, attached = self._outboxes.open()
        commands.attach(owner)
        reader = asyncio.create_task(self._read(commands, owner, attached, request_iterator), name=f"attach-{owner}")
        try:
            while True:
                frame = await attached.outbox.get()
                if frame is None:
                    break
                attached.num_bytes -= frame.ByteSize()
                yield frame
            if attached.error is not None:
                raise attached.error
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            commands.detach(owner)
            self._outboxes.close(owner)
            _log.info("gateway detached", gateway_id=attached.gateway_id)

    async def Trace(
        self, request: router_pb2.TraceRequest, context: Context
    ) -> AsyncIterator[router_pb2.TraceResponse]:
        """Stream what the gates choose."""
        commands, loop = self._ready(), asyncio.get_running_loop()
        self._check_room(commands, "traces", len(self._traces), self._max_traces)
        steps: asyncio.Queue[StepChoices | CollegiumError] = asyncio.Queue(_TRACED_STEPS + 1)
        num_choices, is_slow = 0, False  # choices of experts that wait; whether the end stands in the queue

        def put(choices: StepChoices) -> None:
            nonlocal num_choices, is_slow
            if is_slow or steps.full():
                return
            is_slow = steps.qsize() >= _TRACED_STEPS or num_choices > _TRACED_CHOICES
            if is_slow:
                message = "the trace is read more slowly than the router computes"
                steps.put_nowait(ResourceExhausted(message, reason="SLOW_READER"))
            else:
                num_choices += choices.num_choices
                steps.put_nowait(choices)

        def listen(choices: StepChoices) -> None:
            loop.call_soon_threadsafe(put, choices)

        self._traces.add(steps)
        self._listeners.add(listen)
        try:
            yield trace_header(self._model, self._expert_bytes)
            num_tokens = 0
            while not request.num_tokens or num_tokens < request.num_tokens:
                choices = await steps.get()
                if isinstance(choices, CollegiumError):
                    raise choices
                num_choices -= choices.num_choices
                for message in trace_messages(choices):
                    yield message
                num_tokens += 0 if choices.is_of_sources else len(choices.sequences)
        finally:
            self._listeners.remove(listen)
            self._traces.discard(steps)

    async def _read(
        self, commands: Commands, owner: int, attached: _Attached, frames: AsyncIterator[router_pb2.AttachRequest]
    ) -> None:
        try:
            async for frame in frames:
                try:
                    check_frame(frame)
                    if frame.gateway_id and not attached.gateway_id:
                        attached.gateway_id = frame.gateway_id
                        _log.info("gateway attached", gateway_id=frame.gateway_id)
                    self._take(commands, owner, frame)
                except InvalidArgument as error:
                    commands.refused[error.reason] += 1
                    attached.error = error
                    return
                if len(commands) > _MAX_COMMANDS:  # its step takes long, or the gateway asks too much of it
                    await _taken(commands)
        finally:
            self._outboxes.put(owner, None)

    def _check_room(self, commands: Commands, what: str, count: int, limit: int) -> None:
        if count >= limit:
            reason = f"TOO_MANY_{what.upper()}"
            commands.refused[reason] += 1
            message = f"the router serves {count} {what}; the maximum is {limit} (--max-{what})"
            raise ResourceExhausted(message, reason=reason, remedy="try again later", retry_after_s=1.0)

    def _ready(self) -> Commands:
        if self._commands is None:
            raise Unavailable("the router is loading its model", reason="LOADING", retry_after_s=1.0)
        if self.is_draining or not self._commands.is_served:
            raise _draining()
        return self._commands

    def _take(self, commands: Commands, owner: int, frame: router_pb2.AttachRequest) -> None:
        refused: list[router_pb2.SequenceNews] = []
        for submission in frame.submissions:
            if self._outboxes.is_cut(owner):
                return
            if self.is_draining:
                refused += hand_over(submission)
            else:
                refused += self._submit(commands, owner, submission)
            if len(refused) >= FRAME_NEWS:
                self._outboxes.put(owner, frame_between(refused))
                refused = []
        if refused:
            self._outboxes.put(owner, frame_between(refused))
        commands.cancel(owner, _named(frame.cancellations))
        commands.pause(owner, _named(frame.pauses))
        commands.pause(owner, _named(frame.unpauses), is_paused=False)

    def _submit(
        self, commands: Commands, owner: int, submission: router_pb2.Submission
    ) -> list[router_pb2.SequenceNews]:
        """Hand a submission to the engine; returns the news that refuse it, if it is wrong."""
        try:
            commands.submit(sequences_of(submission, owner, self._model))
            return []
        except InvalidArgument as wrong:
            error: CollegiumError = wrong
        except Exception as fault:
            _log.exception("a submission could not be read", request_id=submission.request_id[:MAX_REQUEST_ID_CHARS])
            message = f"the router could not read the submission ({type(fault).__name__}); its log has the details"
            error = Internal(message, reason="SUBMISSION_FAILED")
        commands.refused[error.reason] += 1
        return refusal(submission, error)


async def _taken(commands: Commands) -> None:
    """Wait until the engine has taken what was asked of it so far."""
    loop, is_taken = asyncio.get_running_loop(), asyncio.Event()
    commands.call(lambda: loop.call_soon_threadsafe(is_taken.set))
    await is_taken.wait()


def _draining() -> Unavailable:
    return Unavailable("the router is draining", reason="DRAINING", retry_after_s=1.0)


def _named(refs: Iterable[router_pb2.SequenceRef]) -> list[Ref]:
    """List the requests and choices that references can mean, each once."""
    named = {(r.request_id, r.choice_index if r.HasField("choice_index") else None): None for r in refs if can_name(r)}
    return list(named)
