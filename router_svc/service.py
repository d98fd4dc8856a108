"""The router's gRPC service: describe the model, attach gateways, let callers trace.

Owns one outbox per attached gateway: the engine's thread fills it, the event loop drains it. A gateway that stops
reading is cut off when its outbox is full; gateways always drain their streams. A trace has such an outbox as well.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import grpc

from collegium.fabric import logs
from collegium.fabric.errors import CollegiumError, ResourceExhausted, Unavailable
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc
from router_svc.engine import Engine, Load, News
from router_svc.messages import frame_of, hand_over, refusal, sequences_of, trace_header, trace_messages
from router_svc.recorder import StepChoices

_log = logs.get("router")
_OUTBOX_FRAMES = 4096  # at one frame a step: minutes of a gateway that does not read
_TRACED_STEPS = 256  # that may wait for a caller of Trace: some tens of MB at most

Frame = router_pb2.AttachResponse
Context = grpc.aio.ServicerContext


@dataclass(slots=True)
class _Attached:
    outbox: asyncio.Queue[Frame | None]
    gateway_id: str = ""
    is_cut: bool = False


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
        try:
            attached.outbox.put_nowait(frame)
        except asyncio.QueueFull:
            attached.is_cut = True
            attached.outbox.get_nowait()
            attached.outbox.put_nowait(None)
            self.on_cut(owner)
            _log.warning("gateway does not read its stream and is cut off", gateway_id=attached.gateway_id)

    def end_all(self) -> None:
        """End every stream."""
        for owner in list(self._attached):
            self.put(owner, None)


class RouterService(router_pb2_grpc.RouterServicer):
    """Implements collegium.v1.Router."""

    def __init__(self, outboxes: Outboxes):
        self._outboxes = outboxes
        self._engine: Engine | None = None  # until the model is loaded
        self._model = inference_pb2.Model()
        self._expert_bytes: Seq[int] = ()
        self._traces: set[asyncio.Queue[StepChoices | CollegiumError]] = set()
        self.router_id = ""
        self.is_draining = False

    def open(self, engine: Engine, model: inference_pb2.Model, expert_bytes: Seq[int]) -> None:
        """Begin to serve a loaded model; `expert_bytes`: of one expert, by MoE layer."""
        self._engine, self._model, self._expert_bytes = engine, model, expert_bytes
        self._outboxes.on_cut = engine.detach

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
        engine = self._ready()
        owner, attached = self._outboxes.open()
        engine.attach(owner)
        reader = asyncio.create_task(self._read(engine, owner, attached, request_iterator), name=f"attach-{owner}")
        try:
            while True:
                frame = await attached.outbox.get()
                if frame is None:
                    return
                yield frame
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            engine.detach(owner)
            self._outboxes.close(owner)
            _log.info("gateway detached", gateway_id=attached.gateway_id)

    async def Trace(
        self, request: router_pb2.TraceRequest, context: Context
    ) -> AsyncIterator[router_pb2.TraceResponse]:
        """Stream what the gates choose."""
        engine, loop = self._ready(), asyncio.get_running_loop()
        steps: asyncio.Queue[StepChoices | CollegiumError] = asyncio.Queue(_TRACED_STEPS + 1)

        def put(choices: StepChoices) -> None:
            if steps.qsize() < _TRACED_STEPS:
                steps.put_nowait(choices)
            elif not steps.full():
                steps.put_nowait(
                    ResourceExhausted("the trace is read more slowly than the router computes", reason="SLOW_READER")
                )

        def listen(choices: StepChoices) -> None:
            loop.call_soon_threadsafe(put, choices)

        self._traces.add(steps)
        engine.recorder.add(listen)
        try:
            yield trace_header(self._model, self._expert_bytes)
            num_tokens = 0
            while not request.num_tokens or num_tokens < request.num_tokens:
                choices = await steps.get()
                if isinstance(choices, CollegiumError):
                    raise choices
                for message in trace_messages(choices):
                    yield message
                num_tokens += len(choices.sequences)
        finally:
            engine.recorder.remove(listen)
            self._traces.discard(steps)

    async def _read(
        self, engine: Engine, owner: int, attached: _Attached, frames: AsyncIterator[router_pb2.AttachRequest]
    ) -> None:
        try:
            async for frame in frames:
                if frame.gateway_id and not attached.gateway_id:
                    attached.gateway_id = frame.gateway_id
                    _log.info("gateway attached", gateway_id=frame.gateway_id)
                self._take(engine, owner, frame)
        finally:
            self._outboxes.put(owner, None)

    def _ready(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the router is loading its model", reason="LOADING", retry_after_s=1.0)
        if self.is_draining or not self._engine.is_alive:
            raise _draining()
        return self._engine

    def _take(self, engine: Engine, owner: int, frame: router_pb2.AttachRequest) -> None:
        for submission in frame.submissions:
            if self.is_draining:
                self._outboxes.put(owner, hand_over(submission))
                continue
            try:
                engine.submit(sequences_of(submission, owner, self._model))
            except ValueError as error:
                self._outboxes.put(owner, refusal(submission, error))
        for ref in frame.cancellations:
            engine.cancel(owner, ref.request_id, _choice(ref))
        for ref in frame.pauses:
            engine.pause(owner, ref.request_id, _choice(ref), True)
        for ref in frame.unpauses:
            engine.pause(owner, ref.request_id, _choice(ref), False)


def _draining() -> Unavailable:
    return Unavailable("the router is draining", reason="DRAINING", retry_after_s=1.0)


def _choice(ref: router_pb2.SequenceRef) -> int | None:
    return ref.choice_index if ref.HasField("choice_index") else None
